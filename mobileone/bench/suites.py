"""Groups of networks that are compared, by name."""

from dataclasses import dataclass

from mobileone.bench.models import has_model
from mobileone.bench.paper import paper_table

__all__ = ["SUITES", "Suite", "get_suite"]


@dataclass(frozen=True)
class Suite:
    """Networks to compare.

    Attributes:
        models: Those that can be built here.
        missing: Those that cannot, by the paper's or timm's name.
    """

    models: tuple[str, ...]
    missing: tuple[str, ...]


_FAMILY = tuple(f"mobileone_s{i}" for i in range(5))

SUITES: dict[str, tuple[str, ...]] = {
    # the names of Table 9; a model without a name for building stands by its own
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


def get_suite(name: str) -> Suite:
    """A suite, divided into what can be built here and what cannot.

    Raises:
        ValueError: It is unknown.
    """
    if name not in SUITES:
        raise ValueError(f"`suite` (={name!r}) must be one of {', '.join(SUITES)}")
    names = SUITES[name]
    here = tuple(n for n in names if has_model(n))
    return Suite(here, tuple(n for n in names if n not in here))
