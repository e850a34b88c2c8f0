"""scikit-learn's handwritten digits as a folder of images, for a start without a download."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mobileone.io.atomic import atomic_write, replace_text

__all__ = ["cache_root", "digits_root", "write_digits"]

_SIZE = 32
_VALIDATION = 360
_INDEX = "digits.json"
_FORMAT = 1


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

    Returns at once if everything is there and intact. Otherwise writes the missing and the
    damaged files, each beside its place and then renamed, so that processes that do this
    at the same time do not disturb each other; other files in ``root`` are left alone.

    Raises:
        FileExistsError: ``root`` holds something else.
    """
    if _intact(root):
        return
    _check_ours(root)
    files = _render()
    for name, content in files.items():
        path = root / name
        if not path.is_file() or path.read_bytes() != content:
            with atomic_write(path) as beside:
                beside.write_bytes(content)
    index = {"format": _FORMAT, "sha256": {name: _digest(data) for name, data in files.items()}}
    replace_text(root / _INDEX, json.dumps(index, indent=0))  # last: it says "complete"


def _intact(root: Path) -> bool:
    try:
        index = json.loads((root / _INDEX).read_bytes())
        digests = index["sha256"].items()
        return (
            index["format"] == _FORMAT
            and bool(digests)
            and all(_digest((root / name).read_bytes()) == digest for name, digest in digests)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _check_ours(root: Path) -> None:
    """Never mix the digits into somebody's own images."""
    if not root.exists() or root == digits_root():
        return
    if not root.is_dir() or (any(root.iterdir()) and not (root / _INDEX).is_file()):
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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
