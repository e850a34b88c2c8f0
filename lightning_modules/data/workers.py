"""Processes that read data: how they start, what they import, and what ends them."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_all_start_methods, parent_process
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

from mobileone.io.user_modules import import_user_modules, imported_user_modules

__all__ = ["worker_options"]


def worker_options(count: int) -> dict[str, Any]:
    """Options of a `DataLoader` with `count` workers, none of them forked from this process.

    This process has threads, and what they hold when it is forked (a lock of the C library, of
    OpenMP, of gloo) is held in the child for ever: such a worker may hang before its first batch.
    They are forked from a process that only imports what they need, and in which nothing runs.
    """
    if count == 0:
        return {"num_workers": 0}
    return {
        "num_workers": count,
        "multiprocessing_context": _context(),
        "worker_init_fn": partial(_begin, imported_user_modules()),
    }


def _context() -> BaseContext | str:
    """What starts workers; a server starts already: it imports while this process goes on."""
    if "forkserver" not in get_all_start_methods():  # Windows
        return "spawn"
    from lightning_modules.data.fork_server import DATA_WORKERS, start_server

    start_server()
    return DATA_WORKERS


def _begin(modules: Sequence[str], worker: int) -> None:
    """Prepare a worker: Pillow's plugins, for example, come with a module of the user's own."""
    import_user_modules(modules)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _leave_signals_to_the_run()


def _end_with_parent() -> None:
    """End when the run has: PyTorch looks whether the process that forked this one lives."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _leave_signals_to_the_run() -> None:
    """Live when a signal reaches the whole process group; the run ends its workers.

    PyTorch ends a worker with a second SIGTERM, where it does not end by itself.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":
        return
    from lightning_modules.data.fork_server import TO_THE_GROUP

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_THE_GROUP)
