"""torchvision's v2 transforms for images with masks or boxes."""

from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lightning_modules.dense.shapes import Picture

__all__ = ["BoxTransform", "MaskTransform"]


class MaskTransform:
    """A generated picture, or VOC's image and mask -> image (3, S, S) and mask (S, S).

    Args:
        model: timm name, whose normalisation is used.
        size: side in pixels.
        augment: crop and mirror at random; else resize.
    """

    def __init__(self, model: str, size: int, augment: bool) -> None:
        square = (size, size)
        place = (
            [v2.RandomResizedCrop(square, scale=(0.25, 1.0)), v2.RandomHorizontalFlip()]
            if augment
            else [v2.Resize(square)]
        )
        config = timm.get_pretrained_cfg(model)
        mean, std = (config.mean, config.std) if config else ((0.5,) * 3, (0.5,) * 3)
        self._change = v2.Compose([*place, *_FLOAT, v2.Normalize(mean, std)])

    def __call__(self, sample: Any) -> tuple[Tensor, Tensor]:
        if isinstance(sample, Picture):
            pixels, classes = sample.image, sample.mask
        else:  # VOC's palette images hold the classes; 255 is no class
            pixels, classes = F.pil_to_tensor(sample[0]), torch.from_numpy(np.array(sample[1]))
        image, mask = self._change(tv_tensors.Image(pixels), tv_tensors.Mask(classes[None]))
        return image.as_subclass(Tensor), mask[0].as_subclass(Tensor).long()


class BoxTransform:
    """A generated picture, or COCO's image and annotations -> image (3, H, W) and target.

    The target has `boxes` (B, 4) as x1, y1, x2, y2 and `labels` (B,); crowds are left out.

    Args:
        augment: crop around objects, as SSD does, and mirror at random.
    """

    def __init__(self, augment: bool) -> None:
        place = [v2.RandomIoUCrop(), v2.RandomHorizontalFlip()] if augment else []
        tidy = [
            v2.ClampBoundingBoxes(),
            v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
            v2.SanitizeBoundingBoxes(),
        ]
        self._change = v2.Compose([*place, *tidy, *_FLOAT])

    def __call__(self, sample: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(sample, Picture):
            pixels, boxes, labels, form = sample.image, sample.boxes, sample.labels, "XYXY"
        else:
            kept = [note for note in sample[1] if not note.get("iscrowd")]
            pixels, form = F.pil_to_tensor(sample[0].convert("RGB")), "XYWH"
            boxes = torch.tensor([note["bbox"] for note in kept], dtype=torch.float32)
            labels = torch.tensor([note["category_id"] for note in kept], dtype=torch.int64)
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes.reshape(-1, 4), format=form, canvas_size=tuple(pixels.shape[-2:])
            ),
            "labels": labels,
        }
        image, target = self._change(tv_tensors.Image(pixels), target)
        return image.as_subclass(Tensor), {k: v.as_subclass(Tensor) for k, v in target.items()}


_FLOAT = (v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),)
