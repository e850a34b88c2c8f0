"""Turn an image file of any colour mode into 8-bit grey, RGB or RGBA."""

import warnings
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = [
    "IMAGE_SUFFIXES",
    "UnreadableImageError",
    "color_mode",
    "read_image",
    "why_unreadable",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File names that count as images, compared in lower case."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableImageError(ValueError):
    """An image file is missing, truncated, or no image; the message names it."""


def color_mode(channels: int) -> str:
    """Pillow's mode for a network with that many input channels.

    Raises:
        ValueError: no mode has that many channels.
    """
    if channels not in _MODES:
        raise ValueError(
            f"input_size has {channels} channels, but images are read as grey (1), RGB (3) or "
            f"RGBA (4). Set the first number of --data.input_size to one of {sorted(_MODES)}."
        )
    return _MODES[channels]


def read_image(file: IO[bytes], mode: str) -> Image.Image:
    """Decode ``file`` completely and convert it to ``mode`` ("L", "RGB" or "RGBA").

    Raises whatever Pillow raises: callers know the file's name and turn it into an
    `UnreadableImageError`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            image.load()  # of an animation the first picture
            return convert(image, mode)


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image file, in words that need no knowledge of Pillow."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or not an image of a known format"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return (
            f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit that Pillow sets "
            "against decompression bombs"
        )
    if isinstance(error, OSError):  # the system's, or Pillow's "image file is truncated"
        return error.strerror or str(error)
    return f"it is damaged: {error}" if str(error) else "it is damaged"


def convert(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in ``mode``, 8 bits a channel.

    Pillow clips 16-bit grey at 255, which leaves a white image: here the range is scaled.
    """
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", "I;16B" …; older Pillow says "I"
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)  # which would copy it
