"""Checkpoints of one file each that appear complete, in a folder that one run at a time holds."""

import contextlib
import shutil
from pathlib import Path
from weakref import proxy

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpointing import AtomicCheckpoint, on_rank_zero
from mobileone.io.atomic import clean_stale, directory_lock, publish_file, staging

__all__ = ["CompleteCheckpoint", "SoleRun"]

_PATIENCE = 15.0  # seconds for which the data workers of a killed run may keep its folder


class CompleteCheckpoint(AtomicCheckpoint):
    """A complete file, and always after a validation."""

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        # after a validation is where `mobileone fit` saves, and where resuming is tested
        return not trainer.enable_validation

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


class SoleRun(Callback):
    """Hold the folders of checkpoints for this run while it trains, also against a crash.

    Args:
        folder: of `last.ckpt`.
        more: of others; the same, or a further one.

    Raises:
        RuntimeError: when training begins, if another run holds one.
    """

    def __init__(self, folder: Path, *more: Path) -> None:
        self.folder = folder
        self.folders = {path.expanduser().resolve() for path in (folder, *more)}
        self._hold = contextlib.ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the folders, and make up for what a killed run has not come to."""
        if failure := on_rank_zero(trainer, lambda: self._take(trainer.ckpt_path)):
            raise RuntimeError(failure)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go: after Ctrl-C Lightning does not tear callbacks down."""
        self._hold.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go."""
        self._hold.close()

    def _take(self, resumed: object) -> str | None:
        try:
            for folder in self.folders:
                self._hold.enter_context(directory_lock(folder, _PATIENCE if resumed else 0.0))
                clean_stale(folder)
        except FileExistsError as error:
            return str(error)
        if resumed is not None:
            _catch_up(Path(str(resumed)), self.folder / "last.ckpt")
        return None


def _catch_up(resumed: Path, last: Path) -> None:
    """Let the newest checkpoint be the last too: a run may be killed between the two."""
    if resumed.absolute().parent != last.parent.absolute() or not last.is_file():
        return
    if resumed.stat().st_mtime_ns <= last.stat().st_mtime_ns:
        return
    with staging(last.parent) as folder:
        shutil.copy2(resumed, folder / last.name)
        publish_file(folder / last.name, last)
