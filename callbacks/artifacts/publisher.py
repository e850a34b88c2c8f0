"""What rank 0 does with the folder of a fit: exports, links, removals, notifications."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.artifacts.folder import CheckpointFolder
from callbacks.artifacts.queue import ExportQueue
from mobileone.export import ExportJob, Manifest
from mobileone.export.worker import ExportResult
from mobileone.io.atomic import clean_stale, directory_lock

__all__ = ["Listener", "MakeJob", "Publisher", "Ranking"]

# Called with the folder and the manifest of a published artifact
Listener = Callable[[Path, Manifest], None]
# The export of a checkpoint with the metrics of its validation; None if only its score is known
MakeJob = Callable[[str, Mapping[str, float] | None], ExportJob]


class Ranking(NamedTuple):
    """The newest checkpoint, and the best ones in order; empty names stand for none."""

    last: str
    best: Sequence[str]


class Publisher:
    """Holds a folder of checkpoints for one fit.

    Methods that end exports return the newest result, a failure before a success; None if no
    export has ended.

    Args:
        trainer: the Trainer of the fit; its loggers get the measurements.
        folder: the folder of checkpoints and artifacts.
        background: export in a worker process.
        timeout: seconds after which a worker is stopped.
        listeners: called with each published artifact, after the links have moved.
        removable: whether a checkpoint may be removed, given the newest one.

    Raises:
        FileExistsError: another process writes there.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: CheckpointFolder,
        background: bool,
        timeout: float,
        listeners: Sequence[Listener],
        removable: Callable[[str, str], bool],
    ) -> None:
        self.trainer, self.folder = trainer, folder
        self.listeners, self.removable = listeners, removable
        self._hold = contextlib.ExitStack()
        self.used = any(folder.path.glob("*.ckpt"))
        # for some seconds a killed run's data workers keep its folder
        self._hold.enter_context(directory_lock(folder.path, 15.0 if self.used else 0.0))
        clean_stale(folder.path)  # what a killed run has left
        self.exports = ExportQueue(folder, background, timeout)

    def warn_if_not_empty(self) -> None:
        """Say so if there are checkpoints, which are then another run's."""
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
        self,
        path: str,
        metrics: Mapping[str, float],
        make_job: MakeJob,
        ranking: Ranking,
        earlier: Collection[str],
    ) -> ExportResult | None:
        """Export a checkpoint that is complete, and those that were missed before.

        Args:
            path: the checkpoint.
            metrics: what its validation logged.
            make_job: the export of any checkpoint.
            ranking: with the new checkpoint in it.
            earlier: checkpoints that were kept before it came.
        """
        results = self.exports.drain()  # those of the validation before
        self.exports.submit(make_job(path, metrics))
        results += self.exports.poll()
        if not any(r.checkpoint == path and r.status != "published" for r in results):
            for missed, known in self._missed(path, ranking.best):
                self.exports.submit(make_job(missed, known))
            results += self.exports.poll()
        return self._update_links_and_prune(results, ranking, earlier)

    def recover(self, make_job: MakeJob, ranking: Ranking) -> ExportResult | None:
        """Bring links and artifacts up to the ranking: a killed run may not have come to it.

        Waits for the exports, since a run that is done has no later moment to do so.
        """
        if not ranking.last:
            return None
        for path in dict.fromkeys([*ranking.best, ranking.last]):
            if not self.folder.has_artifact(path) and not self.folder.is_rejected(path):
                self.exports.submit(make_job(path, None))
        return self._update_links_and_prune(self.exports.drain(), ranking)

    def poll(self, ranking: Ranking) -> ExportResult | None:
        """Take in an export that has ended meanwhile."""
        results = self.exports.poll()
        return self._update_links_and_prune(results, ranking) if results else None

    def drain(self, ranking: Ranking) -> ExportResult | None:
        """Wait for all exports."""
        results = self.exports.drain()
        return self._update_links_and_prune(results, ranking) if results else None

    def _missed(
        self, current: str, best: Sequence[str]
    ) -> Iterator[tuple[str, Mapping[str, float]]]:
        """The best checkpoints whose export failed, but for those that were rejected."""
        for path in best:
            metrics = self.folder.missed_metrics(path)
            if path != current and metrics is not None and not self.folder.is_rejected(path):
                yield path, metrics

    def _update_links_and_prune(
        self, results: Sequence[ExportResult], ranking: Ranking, earlier: Collection[str] = ()
    ) -> ExportResult | None:
        """Move the links, remove what is neither last nor best, notify loggers and listeners."""
        folder, last = self.folder, ranking.last
        before = {*earlier, *folder.linked_checkpoints()}
        folder.move_link("last", [last])
        folder.move_link("best", ranking.best)
        keep = {*ranking.best, last} | folder.linked_checkpoints()
        for old in sorted(before - keep):
            if self.removable(old, last):
                folder.remove(old)
        for result in results:
            self._notify(result)
        failed = [result for result in results if result.status != "published"]
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
