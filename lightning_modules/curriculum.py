"""Transforms that change with the epoch: image size and augmentation strength grow together.

EfficientNetV2's progressive learning, which MobileOne's recipe uses (arXiv 2206.04040, section
4.1). An epoch reaches the workers inside each sample's key, so a switch is exact with persistent
workers, after a resume and on all ranks.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

from timm.data.auto_augment import (
    LEVEL_TO_ARG,
    AugmentOp,
    AugMixAugment,
    AutoAugment,
    RandAugment,
)

from lightning_modules.data.transforms import Transform

__all__ = ["PhasedTransform", "scale_strength"]

# Magnitudes at which an operation does least, where that is not 0: timm's plain enhancements are
# the identity in the middle of their range, and these solarize and posterize less the higher.
_WEAKEST = {
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 5.0),
    **dict.fromkeys(("Solarize", "Posterize", "PosterizeOriginal"), 10.0),
}


class PhasedTransform:
    """The transform of each epoch.

    Args:
        phases: First epoch and transform of each phase, by epoch; the first starts at 0.
    """

    def __init__(self, phases: Sequence[tuple[int, Transform]]) -> None:
        self.starts = [start for start, _ in phases]
        self.transforms = [transform for _, transform in phases]

    def at(self, epoch: int) -> Transform:
        """The transform of an epoch, counted from 0."""
        return self.transforms[bisect_right(self.starts, epoch) - 1]


def scale_strength(transform: Transform, strength: float) -> Transform:
    """Weaken the AutoAugment or RandAugment inside a timm transform.

    Each operation's magnitude moves towards the one at which that operation does least; operations
    without a magnitude (equalize, invert …) are applied less often.

    Args:
        transform: What `timm.data.create_transform` built.
        strength: From 0 (weakest) to 1 (as built).

    Returns:
        A weakened copy.
    """
    weakened = deepcopy(transform)
    for op in _operations(weakened):
        if LEVEL_TO_ARG[op.name] is None:
            op.prob *= strength
        else:
            weakest = _WEAKEST.get(op.name, 0.0)
            op.magnitude = weakest + strength * (op.magnitude - weakest)
    return weakened


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Every operation of the policies inside a `Compose` of timm's."""
    for part in transform.transforms:
        if isinstance(part, AutoAugment):
            yield from chain.from_iterable(part.policy)
        elif isinstance(part, RandAugment | AugMixAugment):
            yield from part.ops
