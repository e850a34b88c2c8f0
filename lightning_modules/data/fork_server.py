"""A fork server for data workers alone, which no signal to the whole process group ends."""

import os
import signal
from io import BytesIO
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
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


_server = _Server()
_server.set_forkserver_preload(_PRELOADED)


class _Popen(popen_forkserver.Popen):
    _fds: list[int]

    def _launch(self, process: Any) -> None:
        """Send a worker to the server; the program's own file only where its data need it.

        `multiprocessing` lets every process run that file first, which in a script without
        `if __name__ == "__main__":` would train once more.
        """
        start = spawn.get_preparation_data(process._name)
        set_spawning_popen(self)
        try:
            work, message = BytesIO(), BytesIO()
            reduction.dump(process, work)
            if b"_main__" not in work.getvalue():  # nor __mp_main__, its name in a spawned process
                start = {k: v for k, v in start.items() if not k.startswith("init_main")}
            reduction.dump(start, message)
        finally:
            set_spawning_popen(None)
        self.sentinel, pipe = _server.connect_to_new_process(self._fds)
        lives = os.dup(pipe)  # closed when this process ends, which the worker waits for
        self.finalizer = util.Finalize(
            self,
            util.close_fds,  # type: ignore[attr-defined]
            (lives, self.sentinel),
        )
        with os.fdopen(pipe, "wb") as file:
            file.write(message.getbuffer())
            file.write(work.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> _Popen:
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process


DATA_WORKERS = _Context()
start_server = _server.ensure_running
