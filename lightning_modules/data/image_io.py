"""Turn an image file of any color mode into 8-bit gray, RGB or RGBA."""

import glob
import os
import stat
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.utils.misc import natural_key

__all__ = [
    "IMAGE_PLUGINS",
    "IMAGE_SUFFIXES",
    "color_mode",
    "find_images",
    "open_image",
    "read_image",
    "why_unreadable",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File names that count as images, compared in lower case."""

# Pillow knows many more, and one of them starts another program
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
IMAGE_PLUGINS = [
    f"PIL.{name}ImagePlugin" for name in ("Png", "Jpeg", "WebP", "Bmp", "Tiff", "Gif", "Ppm")
]
"""Their modules, a tenth of what `Image.init` imports."""
_FLOATING = (
    "its values are floating-point, and nothing says which one is white: save it with 8 or 16 bits"
)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def color_mode(channels: int) -> str:
    """Pillow's mode for a network with that many input channels.

    Raises:
        ValueError: no mode has that many channels.
    """
    if channels not in _MODES:
        raise ValueError(
            f"in_chans={channels} (or the first number of input_size) must be one of "
            f"{sorted(_MODES)}: images are read as gray (1), RGB (3) or RGBA (4)."
        )
    return _MODES[channels]


def open_image(path: str | PathLike[str]) -> IO[bytes]:
    """Open a file of images.

    Raises:
        OSError: There is none, or it is a named pipe or a device, which may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", getattr(os, "O_BINARY", 0)))
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError("it is a named pipe, a folder or a device, and not a file")
    return file


@cache
def _readable_formats() -> list[str]:
    """Those of ours that this Pillow was built with."""
    for plugin in IMAGE_PLUGINS:
        import_module(plugin)
    return [name for name in _FORMATS if name in Image.OPEN]


def read_image(file: IO[bytes], mode: str) -> Image.Image:
    """Decode ``file`` completely and convert it to ``mode`` ("L", "RGB" or "RGBA").

    Raises whatever Pillow raises: callers know the file's name and turn it into an
    `UnreadableImageError`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_readable_formats()) as image:
            image.load()  # of an animation the first picture
            return convert(image, mode)


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image file, in terms that need no knowledge of Pillow."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or not an image of a known format"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return (
            f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit that Pillow sets "
            "against decompression bombs"
        )
    if isinstance(error, OSError):  # the system's, or Pillow's "image file is truncated"
        return error.strerror or str(error)
    if str(error) == _FLOATING:
        return _FLOATING
    return f"it is damaged: {error}" if str(error) else "it is damaged"


def convert(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in ``mode``, 8 bits a channel.

    Pillow clips 16-bit gray at 255, which leaves a white image: here it is scaled.

    Raises:
        ValueError: floating-point values, whose white value is unknown.
    """
    if image.mode == "F":
        raise ValueError(_FLOATING)
    if image.mode.startswith("I"):  # 16-bit gray: "I;16", "I;16B" …; older Pillow says "I"
        gray = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def find_images(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Image files of folders, patterns and single names, each once; folders in natural order.

    Raises:
        FileNotFoundError: a name that does not exist, or no images anywhere.
    """
    given = [images] if isinstance(images, (str, Path)) else list(images)
    found = list(dict.fromkeys(path for item in given for path in _expand(item)))
    if not found:
        shown = ", ".join(repr(str(item)) for item in given) or "an empty list"
        raise FileNotFoundError(
            f"no images in {shown}. Looked for files that end in {', '.join(IMAGE_SUFFIXES)}, in "
            "subfolders too."
        )
    return found


def _expand(item: str | Path) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _sorted(p for p in path.rglob("*") if _is_image(p))
    if glob.has_magic(str(item)):
        matches = (Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
        return _sorted(p for p in matches if _is_image(p))
    raise FileNotFoundError(f"{str(item)!r} does not exist: give a folder, an image or a pattern.")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (natural_key(str(path)), str(path)))
