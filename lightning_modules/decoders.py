"""Two ways to decode training images, Pillow's and torchvision's, and the transform for both."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import IO, Any

import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms.functional import convert_image_dtype, to_tensor

from lightning_modules.images import read_image
from lightning_modules.transforms import Transform

__all__ = ["DECODERS", "Decode", "accept_tensors", "check_decoder", "read_tensor"]

Decode = Callable[[IO[bytes], str], Any]
"""File and Pillow mode -> Pillow image, or uint8 tensor (C, H, W)."""


def read_tensor(file: IO[bytes], mode: str) -> Image.Image | Tensor:
    """Decode an RGB JPEG with torchvision into uint8 (3, H, W), any other image with Pillow.

    Pillow reads the header in either case, so that its checks (format, decompression bombs) stay.
    """
    content = file.read()
    with Image.open(io.BytesIO(content)) as image:
        plain = image.format == "JPEG" and image.mode == mode == "RGB"
    if not plain:
        return read_image(io.BytesIO(content), mode)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError as error:  # with a path in torchvision's sources in front
        raise OSError(str(error).rpartition(", ")[2]) from error


DECODERS: dict[str, Decode] = {"pillow": read_image, "torchvision": read_tensor}


def check_decoder(decoder: str, auto_augment: str | None, color_jitter: float | None) -> None:
    """Raise ValueError for a name that is unknown, or an augmentation that needs Pillow."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r} must be one of {', '.join(DECODERS)}.")
    if decoder != "pillow" and (auto_augment or color_jitter):
        raise ValueError(
            f"decoder={decoder!r} cannot be used with auto_augment or color_jitter, which work on "
            "Pillow's images. Set --data.decoder pillow."
        )


def accept_tensors(transform: Transform) -> Transform:
    """A copy of a timm transform that takes uint8 tensors as well as Pillow images.

    Crops and flips of timm and torchvision do so already; the step to floats does not.
    """
    both: Any = deepcopy(transform)
    both.transforms = [
        _to_float if isinstance(step, MaybeToTensor) else step for step in both.transforms
    ]
    return both


def _to_float(image: Image.Image | Tensor) -> Tensor:
    """8 bits a value -> float in 0..1."""
    if isinstance(image, Tensor):
        return convert_image_dtype(image, torch.float32)
    return to_tensor(image)
