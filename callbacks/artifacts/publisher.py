"""What rank 0 does with the folder of a fit: exports, links, removals, and who is told."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.artifacts.folder import CheckpointFolder
from callbacks.artifacts.queue import ExportQueue, Outcome, Request
from mobileone.export import Manifest, TrainingState
from mobileone.export.manifest import MANIFEST_NAME
from mobileone.io.atomic import clean_stale, directory_lock

__all__ = ["Listener", "Publisher", "Ranking"]

# Called with the folder and the manifest of a published artifact
Listener = Callable[[Path, Manifest], None]


class Ranking(NamedTuple):
    """The newest checkpoint, and the best ones in order; empty names stand for none."""

    last: str
    best: Sequence[str]


class Publisher:
    """Holds a folder of checkpoints for one fit.

    Methods that end exports return what went wrong with the newest of them, empty if nothing; None
    if none has ended.

    Args:
        trainer: of the fit; its loggers get the measurements.
        folder: of checkpoints and artifacts.
        background: export in a worker process.
        timeout: seconds after which a worker is stopped.
        listeners: told of each published artifact, after the links have moved.
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
        training: TrainingState,
        request: Callable[[str, TrainingState], Request],
        ranking: Ranking,
        earlier: Collection[str],
    ) -> str | None:
        """Export a checkpoint that is complete, and those that were missed before.

        Args:
            path: the checkpoint.
            training: where in training it stands.
            request: the export of any checkpoint.
            ranking: with the new checkpoint in it.
            earlier: checkpoints that were kept before it came.
        """
        exports = self.exports
        ended = exports.drain()  # those of the validation before
        exports.submit(request(path, training))
        ended += exports.poll()
        if not any(o.failure and o.checkpoint == path for o in ended):
            for missed, record in self._missed(path, ranking.best):
                exports.submit(request(missed, record))
            ended += exports.poll()
        return self._update_links_and_prune(ended, ranking, earlier)

    def recover(self, request: Callable[[str], Request], ranking: Ranking) -> str | None:
        """Bring links and artifacts up to the ranking: a killed run may not have come to it.

        Waits for the exports, since a run that is done has no later moment to do so.
        """
        for path in dict.fromkeys([*ranking.best, ranking.last]):
            if path and not self.folder.has_artifact(path) and not self._rejected(path):
                self.exports.submit(request(path))
        return self._update_links_and_prune(self.exports.drain(), ranking) if ranking.last else None

    def poll(self, ranking: Ranking) -> str | None:
        """Take in an export that has ended meanwhile."""
        ended = self.exports.poll()
        return self._update_links_and_prune(ended, ranking) if ended else None

    def drain(self, ranking: Ranking) -> str | None:
        """Wait for all exports."""
        ended = self.exports.drain()
        return self._update_links_and_prune(ended, ranking) if ended else None

    def _rejected(self, path: str) -> bool:
        """Whether its artifact failed its checks, as it would again."""
        record = self.folder.recorded_error(path)
        return record is not None and "RejectedError: " in record["error"]

    def _missed(self, current: str, best: Sequence[str]) -> list[tuple[str, TrainingState]]:
        """The best checkpoints whose export failed, but for those that were rejected."""
        folder = self.folder
        records = {
            path: folder.recorded_error(path)
            for path in best
            if path != current and not folder.has_artifact(path) and not self._rejected(path)
        }
        return [
            (path, TrainingState(**record["training"]))
            for path, record in records.items()
            if record
        ]

    def _update_links_and_prune(
        self, ended: Sequence[Outcome], ranking: Ranking, earlier: Collection[str] = ()
    ) -> str | None:
        """Move the links, remove what is neither last nor best, tell the listeners."""
        folder, last = self.folder, ranking.last
        before = {*earlier, *folder.linked_checkpoints()}
        folder.move_link("last", [last])
        folder.move_link("best", ranking.best)
        keep = {*ranking.best, last} | folder.linked_checkpoints()
        for old in sorted(before - keep):
            if self.removable(old, last):
                folder.remove(old)
        for outcome in ended:
            self._tell(outcome)
        failures = [outcome.failure for outcome in ended if outcome.failure]
        return ["", *failures][-1] if ended else None

    def _tell(self, outcome: Outcome) -> None:
        """Log how far the files are from the network, and hand on what was published."""
        artifact = self.folder.artifact_of(outcome.checkpoint)
        published = outcome.failure is None
        place = artifact if published else self.folder.rejected_of(outcome.checkpoint)
        if not (place / MANIFEST_NAME).is_file():
            return
        manifest = Manifest.load(place)
        for logger in self.trainer.loggers:
            logger.log_metrics(manifest.measurements(), step=manifest.training.step)
        if published:
            for listener in self.listeners:
                listener(artifact, manifest)
