"""Two ways to decode training images, of which training uses Pillow's; `benchmark data` says why.

torchvision announced in 0.29 that it will give its decoders up.
"""

import io
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import IO, Any

import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision.transforms.functional import convert_image_dtype, to_tensor

from lightning_modules.data.image_io import read_image
from lightning_modules.data.transforms import Transform

__all__ = ["DECODERS", "Decode", "accept_tensors", "read_tensor"]

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
    from torchvision.io import decode_jpeg  # here, because it will go

    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The image decoding and encoding capabilities")
            return decode_jpeg(data)
    except RuntimeError as error:  # with a path in torchvision's sources in front
        raise OSError(str(error).rpartition(", ")[2]) from error


DECODERS: dict[str, Decode] = {"pillow": read_image, "torchvision": read_tensor}


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
