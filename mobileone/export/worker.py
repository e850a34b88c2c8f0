"""An export in a process of its own, from a snapshot of the network on the CPU.

The parent writes the snapshot and starts `python -m mobileone.export.worker PID FOLDER`; the
worker publishes the artifact and leaves `result.json`. It sees no GPU, and it ends when its parent
does: it looks for that, because a pipe would be held open by other children, as those of a loader.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.manifest import TrainingState
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.io.atomic import clean_stale, replace_text

__all__ = ["ExportJob", "Task", "can_travel"]

_TASK, _RESULT, _LOG = "task.pt", "result.json", "log.txt"
# of torchrun and Lightning, which a process outside the group must not take for its own
_ROLE = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Task:
    """The arguments of `export_model`: the model on the CPU, float or not, in any mode."""

    model: nn.Module
    spec: ExportSpec
    directory: Path
    formats: Sequence[str]
    training: TrainingState
    metadata: Metadata
    images: Tensor | None

    def publish(self, export: Callable[..., Any]) -> None:
        """Call `export_model`, in place of an older artifact of the same name."""
        export(
            self.model,
            self.spec,
            self.directory,
            self.formats,
            self.training,
            self.metadata,
            images=self.images,
            overwrite=True,
        )


def can_travel(model: nn.Module) -> bool:
    """True if another process can find the model's classes: in modules, not in a script.

    A worker must not run the user's script again to have them.
    """
    return all(type(module).__module__ != "__main__" for module in model.modules())


class ExportJob:
    """A running export.

    Args:
        task: what to export.
        folder: an empty folder for the job's own files; removed when the job is over.
        timeout: seconds after which the worker is stopped.

    Raises:
        OSError: the snapshot could not be written, or the process not started.
    """

    def __init__(self, task: Task, folder: Path, timeout: float) -> None:
        self.task, self._folder, self._timeout = task, folder, timeout
        self._started = time.monotonic()
        try:
            torch.save(task, folder / _TASK)
            with (folder / _LOG).open("wb") as log:
                command = [sys.executable, "-m", "mobileone.export.worker"]
                self._process = subprocess.Popen(
                    [*command, str(os.getpid()), str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for the training process
                )
        except BaseException:  # a full disk, or a network that does not pickle
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def running(self) -> bool:
        """True until the worker has ended, or its time is up."""
        return self._process.poll() is None and self._left() > 0

    def _left(self) -> float:
        return self._timeout - (time.monotonic() - self._started)

    def wait(self) -> str | None:
        """Wait for the end, at most until the time is up; returns what went wrong.

        The worker is stopped if anything, Ctrl-C too, ends the wait early.
        """
        try:
            self._process.wait(max(self._left(), 0.0))
            return self._outcome()
        except subprocess.TimeoutExpired:
            return f"the export worker was stopped: it took more than {self._timeout:g} s"
        finally:
            self.stop()

    def stop(self) -> None:
        """End the worker if it runs, and remove what it leaves, but for a published artifact."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            clean_stale(self._folder.parent)

    def _outcome(self) -> str | None:
        result, code = self._folder / _RESULT, self._process.returncode
        if code == 0 and result.is_file():
            error: str | None = json.loads(result.read_text(encoding="utf-8"))["error"]
            return error
        log = (self._folder / _LOG).read_text(encoding="utf-8", errors="replace")
        said = f": ...{log[-500:].strip()}" if log.strip() else ""
        return f"the export worker died (exit status {code}){said}"


def _environment() -> dict[str, str]:
    """The parent's, with its import path; without any GPU, and without its role in a group."""
    kept = {k: v for k, v in os.environ.items() if k not in _ROLE}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**kept, **hidden, "PYTHONPATH": path}


def _main(parent: int, folder: Path) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(5)  # training comes first
    torch.set_num_threads(1)
    error = None
    try:
        _work(folder)
    except Exception:
        error = traceback.format_exc()
    replace_text(folder / _RESULT, json.dumps({"error": error}))


def _work(folder: Path) -> None:
    from mobileone.export.artifact import export_model

    warnings.simplefilter("ignore")  # there is nobody to read them
    task: Any = torch.load(folder / _TASK, weights_only=False)  # the parent's own, just written
    task.publish(export_model)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    # by its importable name, so that the snapshot's classes are these
    from mobileone.export import worker

    worker._main(int(sys.argv[1]), Path(sys.argv[2]))
