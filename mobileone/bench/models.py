"""Networks to measure, by name: timm's, and torchvision's with the prefix `torchvision/`."""

from collections.abc import Iterable
from difflib import get_close_matches

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import mobileone  # noqa: F401  (registers the family)

__all__ = ["TORCHVISION", "build_model", "check_models", "has_model", "input_size_of"]

TORCHVISION = "torchvision/"


def has_model(name: str) -> bool:
    """Whether this installation can build a model of that name."""
    if name.startswith(TORCHVISION):
        return name.removeprefix(TORCHVISION) in _torchvision_names()
    return timm.is_model(name)


def check_models(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple without repeats.

    Raises:
        ValueError: There is none, or one is unknown; names the closest ones.
    """
    if isinstance(names, str):
        raise ValueError(f"`models` (={names!r}) must be a list of names, e.g. [{names!r}]")
    chosen = tuple(dict.fromkeys(names))
    if not chosen:
        raise ValueError("`models` is empty: name at least one, such as mobileone_s0")
    for name in chosen:
        if not has_model(name):
            known = [*timm.list_models(), *(TORCHVISION + n for n in _torchvision_names())]
            close = ", ".join(get_close_matches(name, known))
            hint = f"did you mean {close}?" if close else "timm.list_models() has all names"
            raise ValueError(f"`models`: neither timm nor torchvision has {name!r}; {hint}")
    return chosen


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Build a network with random weights, in eval mode.

    Args:
        name: As `check_models` takes it.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith(TORCHVISION):
            import torchvision

            return torchvision.models.get_model(name.removeprefix(TORCHVISION)).eval()
        return timm.create_model(name).eval()


def input_size_of(model: nn.Module, image_size: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width that a model is meant for; 224 px where it does not say."""
    channels, height, width = 3, 224, 224
    if getattr(model, "pretrained_cfg", None):
        channels, height, width = resolve_data_config({}, model=model)["input_size"]
    return (channels, image_size or height, image_size or width)


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)
