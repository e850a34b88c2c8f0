"""Which errors are sentences for the user, and which need a traceback."""

import os
import traceback
from pathlib import Path

from lightning_modules.images import UnreadableImageError

__all__ = ["UsageError", "message_for_user"]

_OURS = tuple(
    str(Path(__file__).parent.parent / name)
    for name in ("lightning_modules", "callbacks", "mobileone")
)


class UsageError(Exception):
    """Arguments that cannot be used."""


def message_for_user(error: Exception) -> str | None:
    """The message of an error that this project raised on purpose, else None.

    With MOBILEONE_TRACEBACK=1 in the environment every error keeps its traceback.
    """
    if os.environ.get("MOBILEONE_TRACEBACK") == "1":
        return None
    if isinstance(error, UnreadableImageError):
        # from a worker process the message comes with the worker's traceback in front
        return str(error).rsplit("UnreadableImageError: ", 1)[-1].strip()
    if isinstance(error, UsageError) or _raised_here(error):
        return str(error)
    return None


def _raised_here(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    meant = isinstance(error, ValueError | OSError | FloatingPointError | RuntimeError)
    return meant and bool(frames) and frames[-1].filename.startswith(_OURS)
