"""Generated pictures of shapes, with masks and boxes: data for a try and for the tests."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

__all__ = ["CLASSES", "Picture", "Shapes", "corner_boxes"]

CLASSES = ("background", "circle", "square", "triangle")


class Picture(NamedTuple):
    """One picture and what is known of it; torchvision's transforms change all of it alike.

    Attributes:
        image: uint8 (3, H, W).
        mask: The class of each pixel, (H, W).
        boxes: Corners x1, y1, x2, y2 in pixels, (B, 4).
        labels: Classes of the boxes, (B,).
        iscrowd: Whether a box is of a crowd, (B,).
    """

    image: tv_tensors.Image
    mask: tv_tensors.Mask | None = None
    boxes: tv_tensors.BoundingBoxes | None = None
    labels: Tensor | None = None
    iscrowd: Tensor | None = None


class Shapes(Dataset[Picture]):
    """Pictures that are a function of (seed, index).

    Args:
        count: How many.
        size: Side in pixels.
        seed: Pictures of different seeds differ.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return draw_shapes(np.random.default_rng((self.seed, index)), self.size)


def draw_shapes(generator: np.random.Generator, size: int) -> Picture:
    """One to three shapes of any color, apart from each other, on a noisy ground.

    Args:
        generator: Source of everything random.
        size: Side in pixels.
    """
    ground = generator.integers(0, 100, 3)
    noise = generator.integers(-20, 21, (size, size, 3))
    image = Image.fromarray((ground + noise).clip(0, 255).astype(np.uint8))
    mask = Image.new("L", (size, size), 0)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    wanted = int(generator.integers(1, 4))
    while len(boxes) < wanted:
        radius = generator.uniform(0.14, 0.24) * size
        x, y = generator.uniform(radius, size - radius, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        if any(_overlap(box, other) for other in boxes):
            wanted -= len(boxes) > 0  # there is one already: do with fewer
            continue
        label = int(generator.integers(1, len(CLASSES)))
        color = tuple(generator.integers(130, 256, 3).tolist())
        for canvas, fill in ((image, color), (mask, label)):
            _paint(ImageDraw.Draw(canvas), label, (x, y), radius, fill)
        boxes.append(box)
        labels.append(label)
    return Picture(
        tv_tensors.Image(image),
        tv_tensors.Mask(np.array(mask), dtype=torch.int64),
        corner_boxes(torch.tensor(boxes), size, size),
        torch.tensor(labels),
        torch.zeros(len(labels), dtype=torch.int64),
    )


def corner_boxes(corners: Tensor, height: int, width: int) -> tv_tensors.BoundingBoxes:
    """Boxes (B, 4) of an image of that size."""
    return tv_tensors.BoundingBoxes(
        corners, format="XYXY", canvas_size=(height, width), dtype=torch.float32
    )


def _paint(
    draw: ImageDraw.ImageDraw,
    label: int,
    center: tuple[float, float],
    radius: float,
    fill: int | tuple[int, ...],
) -> None:
    """A circle, square or triangle whose bounding box is the square around ``center``."""
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    if CLASSES[label] == "circle":
        draw.ellipse(box, fill=fill)
    elif CLASSES[label] == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x, y - radius), (box[0], box[3]), (box[2], box[3])], fill=fill)


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    left, top = map(max, first[:2], second[:2])
    right, bottom = map(min, first[2:], second[2:])
    return left < right and top < bottom
