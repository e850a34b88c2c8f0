"""scikit-learn's handwritten digits as a folder of images, for a start without a download."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mobileone.io.atomic import atomic_write, replace_text

__all__ = ["cache_root", "digits_root", "write_digits"]

_SIZE = 32
_VALIDATION = 360
_IMAGES = 1797
_COMPLETE = "digits.json"
"""Written last."""


def cache_root() -> Path:
    """``$MOBILEONE_CACHE``, else ``mobileone-lightning`` in the user's (XDG) cache folder."""
    if own := os.environ.get("MOBILEONE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mobileone-lightning"


def digits_root(root: str | None = None) -> Path:
    """The folder that `write_digits` fills: ``root``, or ``digits`` in the cache."""
    return Path(root).expanduser() if root else cache_root() / "digits"


def write_digits(root: Path) -> None:
    """Write the digits as ``root/train/<digit>/*.png`` and ``root/val/<digit>/*.png``.

    1,797 real 8x8 scans (UCI "Optical recognition of handwritten digits", the copy inside
    scikit-learn), 1,437 for training and 360 for validation, every digit in the same proportion.
    Enlarged to 32x32 gray pixels (bilinear): a random crop of an 8x8 image would know only a
    handful of places, and 32 is MobileOne's total stride.

    Returns at once if they are all there. Otherwise writes them, each under another name that is
    then changed, so that processes that do this at the same time do not disturb each other; other
    files in ``root`` are left alone.

    Raises:
        FileExistsError: ``root`` holds something else.
    """
    complete = root / _COMPLETE
    if complete.is_file() and len(list(root.glob("*/*/*.png"))) == _IMAGES:
        return
    _check_ours(root)
    for name, content in _render().items():
        with atomic_write(root / name) as partial:
            partial.write_bytes(content)
    replace_text(complete, "{}")


def _check_ours(root: Path) -> None:
    """Never mix the digits into somebody's own images."""
    if not root.exists() or root == digits_root():
        return
    if not root.is_dir() or (any(root.iterdir()) and not (root / _COMPLETE).is_file()):
        raise FileExistsError(
            f"{str(root)!r} already exists and is not a copy of the digits. Give dataset: digits "
            "a new or empty `root`, or none to use the cache folder."
        )


def _render() -> dict[str, bytes]:
    """Path below the root -> PNG."""
    from sklearn.datasets import load_digits  # a second of import: only when writing
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # (1797, 64), values 0..16
    numbers = np.arange(len(labels))
    _, validation = train_test_split(
        numbers, test_size=_VALIDATION, stratify=labels, random_state=0
    )
    held_out = set(validation.tolist())
    return {
        f"{'val' if number in held_out else 'train'}/{labels[number]}/{number:04d}.png": _png(
            images[number].reshape(8, 8)
        )
        for number in numbers.tolist()
    }


def _png(pixels: np.ndarray) -> bytes:
    """(8, 8) values 0..16 -> a 32x32 gray PNG."""
    gray = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8))
    buffer = io.BytesIO()
    gray.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR).save(buffer, format="PNG")
    return buffer.getvalue()
