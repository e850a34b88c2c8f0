"""Files that are whole or not there: written beside their place, and renamed when complete."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["flush", "replace_text", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at `path`, for a kill at any moment leaves old or new.

    The file is renamed when the block ends. If the block raises, it is removed, and what stood at
    `path` stays. The folder is made if need be. Where a power cut matters too, `flush` the file.

    Args:
        path: The file's place.

    Returns:
        A hidden name beside it with the same ending, nobody else's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, in place of an older one."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Push a file or folder to the disk, so that a power cut cannot reorder it with a rename."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
