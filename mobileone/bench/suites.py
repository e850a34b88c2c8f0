"""Groups of networks that are compared, by name."""

from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import mobileone  # noqa: F401  (registers the family)
from mobileone.bench.paper import paper_table
from mobileone.io.suggest import did_you_mean

__all__ = ["build_model", "choose_models", "input_size_of"]


_FAMILY = tuple(f"mobileone_s{i}" for i in range(5))

SUITES: dict[str, tuple[str, ...]] = {
    # the names of Table 9; a model without a name for building is listed by its own
    "paper": tuple(row["build"] or row["model"] for row in paper_table(9).rows),
    "2026": (
        *_FAMILY,
        "mobilenetv1_100",
        "mobilenetv2_100",
        "mobilenetv3_large_100",
        "mobilenetv4_conv_small",
        "mobilenetv4_conv_medium",
        "efficientnet_b0",
        "torchvision/shufflenet_v2_x1_0",
        "repvgg_a0",
        "fastvit_t8",
        "fastvit_t12",
        "repvit_m0_9",
        "repvit_m1_0",
        "starnet_s1",
        "starnet_s4",
        "shvit_s1",
        "shvit_s4",
    ),
}
"""Names of each suite; which of them can be built depends on the version of timm."""


TORCHVISION = "torchvision/"


def has_model(name: str) -> bool:
    """Whether this installation can build a model of that name."""
    if name.startswith(TORCHVISION):
        return name.removeprefix(TORCHVISION) in _torchvision_names()
    return timm.is_model(name)


def choose_models(
    names: Iterable[str], suite: str | None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Named models, and those of a suite that can be built here, each once.

    Args:
        names: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        suite: A name in `SUITES`; None: the named ones alone.

    Returns:
        The names, and what a result's protocol reports about the choice: `suite` and `missing`.

    Raises:
        ValueError: There is none, or one is unknown; names the closest ones.
    """
    if isinstance(names, str):
        raise ValueError(f"`models` (={names!r}) must be a list of names, e.g. [{names!r}]")
    if suite is not None and suite not in SUITES:
        raise ValueError(f"`suite` (={suite!r}) must be one of {', '.join(SUITES)}")
    members = () if suite is None else SUITES[suite]
    missing = [name for name in members if not has_model(name)]
    chosen = tuple(name for name in dict.fromkeys([*names, *members]) if name not in missing)
    if not chosen:
        raise ValueError(
            "`models` is empty: name at least one, such as mobileone_s0, or a group of them: "
            f"{' or '.join(f'--suite {suite}' for suite in SUITES)}"
        )
    if unknown := next((name for name in chosen if not has_model(name)), None):
        known = [*timm.list_models(), *(TORCHVISION + n for n in _torchvision_names())]
        hint = did_you_mean(unknown, known) or "; timm.list_models() has all names"
        raise ValueError(f"`models`: neither timm nor torchvision has {unknown!r}{hint}")
    return chosen, {} if suite is None else {"suite": suite, "missing": missing}


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Build a network with random weights, in eval mode.

    Args:
        name: As `choose_models` takes it.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith(TORCHVISION):
            import torchvision

            return torchvision.models.get_model(name.removeprefix(TORCHVISION)).eval()
        return timm.create_model(name).eval()


def input_size_of(model: nn.Module, image_size: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width that a model is meant for; 224 px where it is not given."""
    channels, height, width = 3, 224, 224
    if getattr(model, "pretrained_cfg", None):
        channels, height, width = resolve_data_config({}, model=model)["input_size"]
    return (channels, image_size or height, image_size or width)


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)
