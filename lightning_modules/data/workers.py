"""Processes that read data: how they start, what they import, and what ends them."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing import forkserver, get_all_start_methods, parent_process, resource_tracker
from types import FrameType
from typing import Any

from mobileone.io.user_modules import import_user_modules, imported_user_modules

__all__ = ["worker_options"]

_PRELOADED = ["lightning_modules.data.dataset", "lightning_modules.data.dataloader"]


def worker_options(count: int) -> dict[str, Any]:
    """Options of a `DataLoader` with `count` workers, none of them forked from this process.

    This process has threads, and what they hold when it is forked (a lock of the C library, of
    OpenMP, of gloo) is held in the child for ever: such a worker may hang before its first batch.
    They are forked from a process that only imports what they need, and in which nothing runs.
    """
    if count == 0:
        return {"num_workers": 0}
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    if method == "forkserver":
        _start_server()
    return {
        "num_workers": count,
        "multiprocessing_context": method,
        "worker_init_fn": partial(_begin, imported_user_modules()),
    }


def _start_server() -> None:
    """Start it already: it imports while this process does other things.

    A signal to the whole process group must not end it, nor a worker that has just begun: they
    inherit which signals are blocked.
    """
    forkserver.set_forkserver_preload(_PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
    try:
        resource_tracker.ensure_running()  # which lets SIGINT and SIGTERM through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_TO_THE_GROUP = {getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)}


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
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_THE_GROUP)
