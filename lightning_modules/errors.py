"""Which errors are messages for the user, and which need a traceback."""

import os
import traceback
from pathlib import Path

__all__ = ["WORKER_DIED", "UsageError", "is_of_a_dead_worker", "message_for_user"]

WORKER_DIED = (
    "a data worker has died; as a rule the system killed it because memory ran out: lower "
    "--data.num_workers or --data.batch_size, or give the job (a container: its /dev/shm too) more "
    "memory; then continue from the last checkpoint. At the start of a program that has the class "
    'of its data in itself: move that to a module, or what runs under `if __name__ == "__main__":`'
)

_OURS = tuple(
    str(Path(__file__).parent.parent / name)
    for name in ("lightning_modules", "callbacks", "mobileone")
)
_CONNECTION = ("huggingface_hub.", "httpx.", "requests.", "urllib.error")


class UsageError(Exception):
    """Arguments that cannot be used."""


def message_for_user(error: Exception) -> str | None:
    """The message of an error that was raised on purpose, by this project or over its options.

    None: of any other, which needs its traceback. With MOBILEONE_TRACEBACK=1 in the environment
    every error keeps it.
    """
    if os.environ.get("MOBILEONE_TRACEBACK") == "1":
        return None
    if isinstance(error, UnreadableImageError):
        # from a worker process the message comes with the worker's traceback in front
        return str(error).rsplit("UnreadableImageError: ", 1)[-1].strip()
    if isinstance(error, UsageError) or _raised_here(error):
        return str(error)
    if is_of_a_dead_worker(error):
        return WORKER_DIED
    return _of_a_library(error)


def is_of_a_dead_worker(error: Exception) -> bool:
    """Whether PyTorch raised it for a worker of a loader: from a signal handler, so anywhere."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def _raised_here(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    kinds = ValueError | OSError | FloatingPointError | RuntimeError
    meant = isinstance(error, kinds) or type(error) is ImportError  # of a package to install
    return meant and bool(frames) and frames[-1].filename.startswith(_OURS)


def _of_a_library(error: Exception) -> str | None:
    """What a library reports about the options, the connection or a named file."""
    kinds = type(error).__mro__
    if any(f"{kind.__module__}.".startswith(_CONNECTION) for kind in kinds):
        return (
            f"nothing could be fetched from the network: {_first_line(error)}\nfor weights give "
            "a file: --model.pretrained false --model.weights FILE (a teacher's: "
            "--model.teacher_weights FILE)"
        )
    if any(kind.__name__ == "MisconfigurationException" for kind in kinds):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {frame.f_code.co_name for frame in frames}
    by_lightning = frames and frames[-1].f_globals.get("__name__", "").startswith("lightning.")
    if by_lightning and isinstance(error, ValueError | TypeError | ImportError):
        if names & {"_instantiate_trainer", "setup_data"}:
            return f"--trainer: {str(error).strip()}"
        if "_set_seed" in names:
            return f"--seed_everything: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UnreadableImageError(ValueError):
    """An image file is missing, truncated, no image, or of no class; the message names it."""
