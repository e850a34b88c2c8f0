"""The exports of a fit: one after the other, here or in a worker process."""

from collections import deque
from contextlib import suppress
from pickle import PicklingError

from callbacks.artifacts.folder import CheckpointFolder
from mobileone.export import ExportJob
from mobileone.export.worker import ExportResult, ExportWorker, can_travel, run_job
from mobileone.io.atomic import staging_folder

__all__ = ["ExportQueue"]


class ExportQueue:
    """A queue with at most one export under way.

    What has not ended well is on record next to its checkpoint from the moment it begins, so that
    a process that is killed leaves no artifact that could be taken for complete.

    Args:
        folder: where checkpoints and artifacts are.
        background: export in a worker process; otherwise `submit` returns when all is done. A
            network that another process can neither rebuild nor unpickle is exported in this one.
        timeout: seconds after which a worker is stopped.
    """

    def __init__(self, folder: CheckpointFolder, background: bool, timeout: float) -> None:
        self.folder, self.background, self.timeout = folder, background, timeout
        self._queue: deque[ExportJob] = deque()
        self._worker: ExportWorker | None = None
        self._ended: list[ExportResult] = []

    @property
    def under_way(self) -> bool:
        """Whether a worker runs."""
        return self._worker is not None and self._worker.running()

    def submit(self, job: ExportJob) -> None:
        """Export a checkpoint, now or after those before it."""
        self._record(job, "failed", "the export has not ended")
        self._queue.append(job)
        self._advance()

    def poll(self) -> list[ExportResult]:
        """What has ended since the last call, without waiting."""
        if self._worker and not self._worker.running():
            self._finish()
            self._advance()
        ended, self._ended = self._ended, []
        return ended

    def drain(self) -> list[ExportResult]:
        """Wait for all of them."""
        while self._worker:
            self._finish()
            self._advance()
        return self.poll()

    def stop(self) -> None:
        """End the worker, if there is one; what it had not published stays on record."""
        self._queue.clear()
        if self._worker:
            self._worker.stop()
            self._worker = None

    def _advance(self) -> None:
        """Begin what can begin."""
        while self._queue and not self._worker:
            job = self._queue.popleft()
            try:
                self._begin(job)
            except Exception as error:  # the disk is full, or no process can be started
                self._end(job, ExportResult.of(job, "failed", f"{type(error).__name__}: {error}"))

    def _begin(self, job: ExportJob) -> None:
        if self.background and can_travel(job):
            with suppress(PicklingError, AttributeError, TypeError):  # by pickle
                place = staging_folder(self.folder.path)
                self._worker = ExportWorker(job, place, self.timeout)
                return
        self._end(job, run_job(job))

    def _finish(self) -> None:
        assert self._worker is not None
        worker, self._worker = self._worker, None
        self._end(worker.job, worker.wait())

    def _end(self, job: ExportJob, result: ExportResult) -> None:
        if result.status == "published":
            self.folder.clear_error(result.checkpoint)
        else:
            self._record(job, result.status, str(result.details))
        self._ended.append(result)

    def _record(self, job: ExportJob, status: str, error: str) -> None:
        with suppress(OSError):  # a full disk is no reason to stop
            self.folder.record_error(job.checkpoint, status, error, job.metrics)
