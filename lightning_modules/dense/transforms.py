"""torchvision's v2 transforms for images with masks or boxes."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_modules.dense.shapes import Picture
from lightning_modules.dense.sources import Boxed, Masked

__all__ = ["BoxTransform", "MaskTransform"]


class MaskTransform:
    """A picture with its mask -> image (3, S, S), normalized, and mask (S, S).

    Args:
        mean: subtracted from images scaled to 0..1, one a channel.
        std: that the difference is divided by.
        size: side in pixels.
        augment: crop and mirror at random; else resize.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], size: int, augment: bool
    ) -> None:
        square = (size, size)
        place = (
            [v2.RandomResizedCrop(square, scale=(0.25, 1.0)), v2.RandomHorizontalFlip()]
            if augment
            else [v2.Resize(square)]
        )
        self._change = v2.Compose([*place, *_FLOAT, v2.Normalize(list(mean), list(std))])

    def __call__(self, sample: Picture | Masked) -> tuple[Tensor, Tensor]:
        image, mask = self._change(
            tv_tensors.Image(sample.image), tv_tensors.Mask(sample.mask[None])
        )
        return image.as_subclass(Tensor), mask[0].as_subclass(Tensor).long()


class BoxTransform:
    """A picture with its boxes -> image (3, H, W) in 0..1 and target.

    The target has `boxes` (B, 4) as x1, y1, x2, y2, `labels` (B,) and `iscrowd` (B,).

    Args:
        augment: crop around objects, as SSD does, mirror at random, and leave out boxes of which
            nothing remains; else change nothing.
    """

    def __init__(self, augment: bool) -> None:
        place = [
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(labels_getter=_beside_boxes),
        ]
        self._change = v2.Compose([*(place if augment else []), *_FLOAT])

    def __call__(self, sample: Picture | Boxed) -> tuple[Tensor, dict[str, Tensor]]:
        crowds = sample.iscrowd if isinstance(sample, Boxed) else torch.zeros_like(sample.labels)
        boxes = tv_tensors.BoundingBoxes(
            sample.boxes, format="XYXY", canvas_size=tuple(sample.image.shape[-2:])
        )
        target = {"boxes": boxes, "labels": sample.labels, "iscrowd": crowds}
        image, target = self._change(tv_tensors.Image(sample.image), target)
        return image.as_subclass(Tensor), {k: v.as_subclass(Tensor) for k, v in target.items()}


def _beside_boxes(sample: Any) -> tuple[Tensor, Tensor]:
    """What goes with a box when it is left out."""
    return sample[1]["labels"], sample[1]["iscrowd"]


_FLOAT = (v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),)
