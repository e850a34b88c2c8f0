"""A fork server for data workers alone, which no signal to the whole process group ends."""

import signal
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import FunctionType
from typing import Any

from lightning_modules.data.image_io import IMAGE_PLUGINS

__all__ = ["DATA_WORKERS", "TO_THE_GROUP", "start_server"]

TO_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_ROOM = "lightning_modules.data"
_PRELOADED = [f"{_ROOM}.dataset", f"{_ROOM}.dataloader", *IMAGE_PLUGINS, f"{_ROOM}.frozen"]


class _Server(forkserver.ForkServer):
    """Not the one of `multiprocessing`, from which a program's other processes come.

    What is imported there, and which signals are blocked, would be theirs as well.
    """

    def ensure_running(self) -> None:
        """Start it with the signals blocked: a worker inherits that, until it has handlers."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_GROUP)
        try:
            resource_tracker.ensure_running()  # which lets SIGINT and SIGTERM through again
            signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_GROUP)
            super().ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __getattr__(self, name: str) -> Any:
        return getattr(forkserver, name)


_server = _Server()
_server.set_forkserver_preload(_PRELOADED)


class _Popen(popen_forkserver.Popen):
    # the base class's own, which knows the one server of `multiprocessing` by a global name
    _launch = FunctionType(
        popen_forkserver.Popen._launch.__code__,  # type: ignore[attr-defined]
        {**vars(popen_forkserver), "forkserver": _server},
    )


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> _Popen:
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process


DATA_WORKERS = _Context()
start_server = _server.ensure_running
