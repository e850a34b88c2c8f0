"""Mixup and cutmix of training batches."""

import math
from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

__all__ = ["make_mixing"]

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mixing(mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
    """Mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), or one of them at random a batch.

    They draw from torch's CPU generator. Each image is mixed with its neighbor in the batch.

    Args:
        mixup: alpha of the Beta distribution of the share, 0 for no mixup.
        cutmix: alpha of the Beta distribution of the kept area, 0 for no cutmix.
        num_classes: number of classes.

    Returns:
        A function (images (N, C, H, W), targets (N,)) -> (mixed images (N, C, H, W), soft targets
        (N, num_classes), whose rows sum to 1); None if both are 0.

    Raises:
        ValueError: an alpha is negative or not finite.
    """
    mixing = []
    for name, alpha, transform in (("mixup", mixup, v2.MixUp), ("cutmix", cutmix, v2.CutMix)):
        if not 0 <= alpha < math.inf:
            raise ValueError(
                f"`{name}` (={alpha}) must be at least 0 and finite: it is the alpha of a Beta "
                "distribution, for example 0.2 (mixup) or 1.0 (cutmix); 0 is off"
            )
        if alpha:
            mixing.append(transform(alpha=alpha, num_classes=num_classes))
    return v2.RandomChoice(mixing) if len(mixing) > 1 else mixing[0] if mixing else None
