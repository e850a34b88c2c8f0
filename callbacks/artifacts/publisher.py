"""What rank 0 does with the folder of a fit: exports, links, removals, notifications.

Exports run one after the other, in this process or in a worker's.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import PicklingError

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.artifacts.folder import CheckpointFolder
from mobileone.export import ExportJob, Manifest
from mobileone.export.worker import ExportResult, ExportWorker, can_travel, run_job
from mobileone.io.atomic import clean_stale, directory_lock

__all__ = ["ExportQueue", "Listener", "MakeJob", "Publisher"]

# Called with the folder and the manifest of a published artifact
Listener = Callable[[Path, Manifest], None]
# The export of a checkpoint with the metrics of its validation; None if only its score is known
MakeJob = Callable[[str, Mapping[str, float] | None], ExportJob]


# The newest checkpoint, and the best ones in order; an empty name means none
Ranking = Callable[[], tuple[str, Sequence[str]]]


class ExportQueue:
    """A queue with at most one export running.

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

    def holds(self, checkpoint: str) -> bool:
        """Whether the export of a checkpoint has yet to end."""
        running = [self._worker.job] if self._worker else []
        return any(str(job.checkpoint) == checkpoint for job in [*running, *self._queue])

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
            with self._failing(job):  # the disk is full, or no process can be started
                self._begin(job)

    def _begin(self, job: ExportJob) -> None:
        if self.background and can_travel(job):
            with contextlib.suppress(PicklingError, AttributeError, TypeError):  # by pickle
                self._worker = ExportWorker(job, self.folder.path, self.timeout)
                return
        self._end(job, run_job(job))

    def _finish(self) -> None:
        assert self._worker is not None
        worker, self._worker = self._worker, None
        with self._failing(worker.job):  # what it has written cannot be read
            self._end(worker.job, worker.wait())

    @contextlib.contextmanager
    def _failing(self, job: ExportJob) -> Iterator[None]:
        """Whatever is raised here is a failed export; the next one begins."""
        try:
            yield
        except Exception as error:
            self._end(job, ExportResult.of(job, "failed", f"{type(error).__name__}: {error}"))

    def _end(self, job: ExportJob, result: ExportResult) -> None:
        if result.status == "published":
            self.folder.clear_error(result.checkpoint)
        else:
            self._record(job, result.status, str(result.details))
        self._ended.append(result)

    def _record(self, job: ExportJob, status: str, error: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop training
            self.folder.record_error(job.checkpoint, status, error, job.metrics)


class Publisher:
    """Holds a folder of checkpoints for one fit.

    Methods that end exports return the newest result, one with a reason before one without; None
    if no export has ended.

    Args:
        trainer: the Trainer of the fit; its loggers get the measurements.
        folder: the folder of checkpoints and artifacts.
        exports: runs the exports.
        make_job: the export of any checkpoint.
        ranking: gives the newest checkpoint and the best ones, as they are now.
        listeners: called with each published artifact, after the links have moved.
        removable: whether a checkpoint may be removed, given the newest one.

    Raises:
        FileExistsError: another process writes there.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: CheckpointFolder,
        exports: ExportQueue,
        make_job: MakeJob,
        ranking: Ranking,
        listeners: Sequence[Listener],
        removable: Callable[[str, str], bool],
    ) -> None:
        self.trainer, self.folder, self.exports = trainer, folder, exports
        self.make_job, self.ranking = make_job, ranking
        self.listeners, self.removable = listeners, removable
        self._hold = contextlib.ExitStack()
        self.used = any(folder.path.glob("*.ckpt"))
        # for some seconds a killed run's data workers keep its folder
        self._hold.enter_context(directory_lock(folder.path, 15.0 if self.used else 0.0))
        clean_stale(folder.path)  # what a killed run has left

    def warn_if_not_empty(self) -> None:
        """Warn if there are checkpoints, which are then another run's."""
        if self.used:
            rank_zero_warn(
                f"{self.folder.path} holds checkpoints of another run: those of the same name will "
                "be replaced, the others stay and do not count as best"
            )

    def close(self) -> None:
        """Leave no process and no lock behind."""
        self.exports.stop()
        self._hold.close()

    def publish(
        self, path: str, metrics: Mapping[str, float], earlier: Sequence[str]
    ) -> ExportResult | None:
        """Export a checkpoint that is complete, and those that were missed before.

        Args:
            path: the checkpoint, which the ranking has already.
            metrics: what its validation logged.
            earlier: checkpoints that were kept before it came, from the best on, then the last.
        """
        results = self.exports.drain()  # those of the validation before
        self.exports.submit(self.make_job(path, metrics))
        results += self.exports.poll()
        if not any(r.checkpoint == path and r.status != "published" for r in results):
            for missed, known in self._missed(path):
                self.exports.submit(self.make_job(missed, known))
            results += self.exports.poll()
        return self._update_links_and_prune(results, earlier)

    def recover(self) -> ExportResult | None:
        """Bring links and artifacts up to the ranking: a killed run may not have come to it.

        Waits for the exports, since a run that is done has no later moment to do so.
        """
        last, best = self.ranking()
        if not last:
            return None
        for path in dict.fromkeys([*best, last]):
            if not self.folder.has_artifact(path) and not self.folder.is_rejected(path):
                self.exports.submit(self.make_job(path, None))
        return self._update_links_and_prune(self.exports.drain())

    def poll(self) -> ExportResult | None:
        """Take in an export that has ended meanwhile."""
        results = self.exports.poll()
        return self._update_links_and_prune(results) if results else None

    def drain(self) -> ExportResult | None:
        """Wait for all exports."""
        results = self.exports.drain()
        return self._update_links_and_prune(results) if results else None

    def _missed(self, current: str) -> Iterator[tuple[str, Mapping[str, float]]]:
        """The best checkpoints whose export failed, without those that were rejected."""
        for path in self.ranking()[1]:
            metrics = self.folder.missed_metrics(path)
            if path != current and metrics is not None and not self.folder.is_rejected(path):
                yield path, metrics

    def _update_links_and_prune(
        self, results: Sequence[ExportResult], earlier: Sequence[str] = ()
    ) -> ExportResult | None:
        """Move the links, remove what is neither last nor best, notify loggers and listeners."""
        folder, (last, best) = self.folder, self.ranking()
        before = {*earlier, *folder.linked_checkpoints()}
        folder.move_link("last", [last, *earlier[-1:]])
        # until the newest one's export has ended, both links stay on the best one before it
        waits = last if self.exports.holds(last) else None
        ended = [c for c in (*best, *earlier[:-1]) if c != waits] if best else []
        if ended or not best or folder.linked_artifact("best") is None:
            folder.move_link("best", ended or best)
        keep = {*best, last} | folder.linked_checkpoints()
        for old in sorted(before - keep):
            if self.removable(old, last):
                folder.remove(old)
        for result in results:
            self._notify(result)
        failed = [result for result in results if result.reason]
        return [None, *results, *failed][-1]

    def _notify(self, result: ExportResult) -> None:
        """Log how far the files are from the network, and call the listeners."""
        if result.manifest is None:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(result.manifest.measurements(), step=result.manifest.training.step)
        if result.status == "published":
            for listener in self.listeners:
                listener(self.folder.artifact_of(result.checkpoint), result.manifest)
