"""An export in a process of its own, which reads the checkpoint by itself.

The parent writes the job and starts `python -m mobileone.export.worker PID FOLDER [MODULE ...]`;
the worker imports the modules, publishes the artifact and leaves `result.json`. It sees no GPU, and
it ends when its parent does: it looks for that, because a pipe would be held open by other
children, as those of a loader.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from mobileone.export.artifact import REJECTED, RejectedError
from mobileone.export.checkpoint import ExportJob
from mobileone.export.formats.table import FORMATS
from mobileone.export.manifest import MANIFEST_NAME, Manifest
from mobileone.io.atomic import clean_stale, replace_text, staging
from mobileone.io.user_modules import import_user_modules, imported_user_modules

__all__ = ["ExportResult", "ExportWorker", "Status", "can_travel", "modules_to_import", "run_job"]

_JOB, _RESULT, _LOG = "job.pt", "result.json", "log.txt"
# of torchrun and Lightning, which a process outside the group must not take for its own
_ROLE = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_KNOWN = ("mobileone", "timm")  # what every worker imports

Status = Literal["published", "rejected", "failed"]


@dataclass(frozen=True)
class ExportResult:
    """How an export ended.

    Attributes:
        checkpoint: the file that was exported.
        status: `published`, if there is a file; `rejected`, if all failed their checks, as they
            would again; `failed`.
        manifest: that of the published or the rejected folder; None if there is neither.
        reason: why a file is missing, in a line; None if none is.
        details: the traceback, or more of the same.
    """

    checkpoint: str
    status: Status
    manifest: Manifest | None = None
    reason: str | None = None
    details: str | None = None

    @classmethod
    def of(
        cls, job: ExportJob, status: Status, reason: str = "", details: str = ""
    ) -> "ExportResult":
        """The result of a job, with the manifest that it has written."""
        checkpoint = str(job.checkpoint)
        folder = job.directory
        if status == "published":
            manifest = Manifest.load(folder)
            missing = "; ".join(f"{name}: {why}" for name, why in manifest.rejected.items())
            said = f"{folder.name} has files for {', '.join(manifest.formats)}, and not for"
            return cls(checkpoint, status, manifest, f"{said} {missing}" if missing else None)
        reason = f"Exporting {folder.name} failed: {reason}"
        rejected = folder.with_name(folder.name + REJECTED)
        written = status == "rejected" and (rejected / MANIFEST_NAME).is_file()
        found = Manifest.load(rejected) if written else None
        return cls(checkpoint, status, found, reason, details or reason)


def run_job(job: ExportJob) -> ExportResult:
    """Export in this process; whatever goes wrong is in the result."""
    return ExportResult.of(job, *_run(job))


def _run(job: ExportJob) -> tuple[Status, str, str]:
    """Status, reason and details."""
    try:
        job.run()
        return "published", "", ""
    except RejectedError as error:
        return "rejected" if error.final else "failed", str(error), traceback.format_exc()
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", traceback.format_exc()


def modules_to_import(job: ExportJob) -> tuple[str, ...]:
    """The modules that register a job's network and formats, all of which this process has.

    They were imported by `--imports`, or by the user's script, which may be the module itself:
    `__main__`. None is named by the checkpoint.
    """
    found = [
        *imported_user_modules(),
        *(_module_of(FORMATS[name].write) for name in job.formats or ()),
    ]
    if job.network is None and job.spec is not None and timm.is_model(job.spec.model_name):
        found.append(timm.model_entrypoint(job.spec.model_name).__module__)
    return tuple(dict.fromkeys(name for name in found if name.partition(".")[0] not in _KNOWN))


def can_travel(job: ExportJob) -> bool:
    """True if a worker can import what the job needs: from modules, not from a script.

    A worker must not run the user's script again to have it.
    """
    classes = () if job.network is None else (type(m).__module__ for m in job.network.modules())
    return "__main__" not in {*modules_to_import(job), *classes}


def _module_of(function: Callable[..., Any]) -> str:
    plain = function.func if isinstance(function, partial) else function
    return plain.__module__


class ExportWorker:
    """A running export.

    Args:
        job: what to export.
        parent: gets a folder for the worker's own files, which is removed when the job is over.
        timeout: seconds after which the worker is stopped.

    Raises:
        OSError: the job could not be written, or the process not started.
    """

    def __init__(self, job: ExportJob, parent: Path, timeout: float) -> None:
        self.job, self._parent, self._timeout = job, parent, timeout
        self._started = time.monotonic()
        self._held = contextlib.ExitStack()
        folder = self._folder = self._held.enter_context(staging(parent))
        try:
            torch.save(job, folder / _JOB)
            with (folder / _LOG).open("wb") as log:
                command = [sys.executable, "-m", "mobileone.export.worker"]
                self._process = subprocess.Popen(
                    [*command, str(os.getpid()), str(folder), *modules_to_import(job)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for the training process
                )
        except BaseException:  # a full disk, or a network that does not pickle
            self._held.close()
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

    def wait(self) -> ExportResult:
        """Wait for the end, at most until the time is up.

        The worker is stopped if anything, Ctrl-C too, ends the wait early.
        """
        try:
            self._process.wait(max(self._left(), 0.0))
            return ExportResult.of(self.job, *self._outcome())
        except subprocess.TimeoutExpired:
            reason = f"the export worker was stopped: it took more than {self._timeout:g} s"
            return ExportResult.of(self.job, "failed", reason)
        finally:
            self.stop()

    def stop(self) -> None:
        """End the worker if it runs, and remove what it leaves, except a published artifact."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # a fault of a shared folder must not end a training
            self._held.close()
            clean_stale(self._parent)

    def _outcome(self) -> tuple[Status, str, str]:
        """Status, reason and details, by the worker itself if it could still write them."""
        result, code = self._folder / _RESULT, self._process.returncode
        if code == 0 and result.is_file():
            written = json.loads(result.read_text(encoding="utf-8"))
            return written["status"], written["reason"], written["details"]
        log = (self._folder / _LOG).read_text(encoding="utf-8", errors="replace")
        said = f": ...{log[-500:].strip()}" if log.strip() else ""
        return "failed", f"the export worker died (exit status {code}){said}", ""


def _environment() -> dict[str, str]:
    """The parent's, with its import path; without any GPU, and without its role in a group."""
    kept = {k: v for k, v in os.environ.items() if k not in _ROLE}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**kept, **hidden, "PYTHONPATH": path}


def _main(parent: int, folder: Path, modules: Sequence[str]) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(5)  # training comes first
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # nobody reads them
    import_user_modules(modules)
    # the parent's own file, just written
    job = torch.load(folder / _JOB, map_location="cpu", weights_only=False)
    status, reason, details = _run(job)
    result = {"status": status, "reason": reason, "details": details}
    replace_text(folder / _RESULT, json.dumps(result))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    # by its importable name, so that classes are those of other modules
    from mobileone.export import worker

    worker._main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
