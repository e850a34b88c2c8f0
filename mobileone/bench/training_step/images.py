"""Images to train on in a measurement: noise, or crops of two photographs."""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

__all__ = ["ImageKind", "sample_images"]

ImageKind = Literal["photos", "noise"]
"""`photos`: neighbors are alike, as in what networks train on; `noise`: nothing is."""

_PHOTOS = ("china.jpg", "flower.jpg")
_SMALLEST = 0.4  # side of a crop, of the photograph's height


def sample_images(kind: ImageKind, number: int, size: int) -> Tensor:
    """Images (number, 3, size, size) of mean 0 and deviation 1 about, the same in every call.

    Args:
        kind: Which images. Photographs are the two that scikit-learn ships, in square crops of
            random place and size, normalized as ImageNet's.
        number: How many.
        size: Height and width in pixels.
    """
    chance = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(number, 3, size, size, generator=chance)
    photos = _photographs()
    crops = []
    for i in range(number):
        photo = photos[i % len(photos)]
        height, width = photo.shape[1:]
        part, top, left = torch.rand(3, generator=chance).tolist()
        side = round(height * (_SMALLEST + (1 - _SMALLEST) * part))
        top, left = round(top * (height - side)), round(left * (width - side))
        crop = photo[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (torch.cat(crops) - mean) / std


def _photographs() -> list[Tensor]:
    """In [0, 1], (3, H, W)."""
    from sklearn.datasets import load_sample_image  # takes a second

    arrays = [load_sample_image(name) for name in _PHOTOS]
    return [torch.tensor(array).permute(2, 0, 1).float() / 255 for array in arrays]
