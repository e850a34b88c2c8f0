"""Signals that ask a run to stop: remembered, and acted on where nothing is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["ForceQuit", "Interrupted", "ShutdownSignal", "interruptible"]


class Interrupted(SIGTERMException):
    """A run ended by Ctrl-C, after the step that was running.

    Not KeyboardInterrupt, on which Lightning kills the other processes, notices that they were
    killed, and kills this one.
    """

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGINT)


class ForceQuit(KeyboardInterrupt):
    """A second Ctrl-C: nothing is waited for."""


class ShutdownSignal:
    """Listens for SIGINT, SIGTERM and, in a SLURM job, for the signal before preemption.

    Lightning's own handlers would save in the middle of a step (SLURM), or break one off (SIGINT).
    A second Ctrl-C does so still. Processes forked from this one, as a loader's, do not listen.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._requeue = False
        self._listener = os.getpid()
        self._speaks = True

    def listen(self, trainer: Trainer) -> None:
        """Take the signals over; only the main thread can."""
        self.received = None
        self._listener, self._speaks = os.getpid(), trainer.is_global_zero
        wanted: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
            signal.SIGINT: self._on_interrupt,
            signal.SIGTERM: self._on_signal,
        }
        environment = trainer._accelerator_connector.cluster_environment
        self._requeue = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if self._requeue:
            preempts = getattr(environment, "requeue_signal", None) or signal.SIGUSR1
            wanted[preempts] = self._on_signal
        for number, handler in wanted.items():
            try:
                self._before[number] = signal.signal(number, handler)
            except ValueError:  # not in the main thread
                return

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def raise_if_set(self, trainer: Trainer) -> NoReturn:
        """End the fit. A preempted SLURM job is queued again first.

        Raises:
            Interrupted: on SIGINT.
            SIGTERMException: on any other signal, or one that another rank received.
        """
        if self.received is signal.SIGINT:
            raise Interrupted
        if self._requeue and self.received not in (None, signal.SIGTERM):
            if trainer.is_global_zero:
                _requeue()
        raise SIGTERMException

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._listener:  # the terminal signals a loader's workers too
            return
        if self.received is not None:
            raise ForceQuit
        self.received = signal.SIGINT
        if self._speaks:  # print() may be what was interrupted
            os.write(
                sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n"
            )


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in this block, whatever it does outside."""
    try:
        before = signal.signal(signal.SIGINT, signal.default_int_handler) or signal.SIG_DFL
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _requeue() -> None:
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM job {job!r} could not be queued again ({error}): submit it again")
