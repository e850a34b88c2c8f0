"""Checkpoints between validations, to resume from; and one when the run is asked to stop."""

import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.checkpointing import on_rank_zero, save_complete, step_in_name
from callbacks.dry_run import is_dry_run
from callbacks.signals import ShutdownSignal
from mobileone.io.atomic import clean_stale, discard

__all__ = ["Snapshots"]

_NAME = "step={:08d}.ckpt"


class Snapshots(Checkpoint):
    """Save the whole state of training within epochs, however long they are.

    `<dirpath>/step=00001200.ckpt` are training checkpoints without artifact; the newest `keep`
    stay. A resumed run repeats nothing before the snapshot, and continues bit for bit.

    On SIGTERM, SIGINT (once) and SLURM's signal before preemption the run ends after the step that
    is running, with a snapshot. No snapshot is made between a step and the validation that
    follows it: the resumed run would leave the validation out; there is one from the step
    before. A signal in a validation ends the run at once; one that reaches several processes there
    takes effect after the next step.

    Weights that are not finite are not saved: the run stops, and older snapshots stay. If it stops
    for a loss or gradient that is not, the snapshot of that very step becomes `….ckpt.diverged`.

    Args:
        every_n_steps: optimizer steps between two snapshots; 0 for no such rule.
        every_minutes: time between two snapshots; 0 for no such rule.
        keep: how many to keep. Two, in case the newest is found damaged.
        dirpath: folder; None for `snapshots` in the trainer's `default_root_dir`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        every_minutes: float = 15.0,
        keep: int = 2,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps < 0 or every_minutes < 0:
            raise ValueError(
                f"`every_n_steps` (={every_n_steps}) and `every_minutes` (={every_minutes}) must "
                "be at least 0"
            )
        if keep < 1:
            raise ValueError(f"`keep` (={keep}) must be at least 1")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.dirpath = dirpath
        self._folder: Path | None = None  # while there is something to save
        self._stop = ShutdownSignal()
        self._saved_at = (0, 0.0)  # step, clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals; Lightning has set its own handlers just before."""
        if is_dry_run(trainer):
            return
        self._folder = Path(self.dirpath or Path(trainer.default_root_dir) / "snapshots")
        self._saved_at = (trainer.global_step, time.monotonic())
        if trainer.is_global_zero:
            clean_stale(self._folder)
        self._stop.listen(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time; stop if a signal has come."""
        if self._folder is None:
            return
        wanted, stop = self._agree(trainer)
        # the gradients of an unfinished accumulation would be lost
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if _validation_follows(trainer, batch_idx) or not complete:
            if stop and complete:
                self._stop.raise_if_set(trainer)
            return
        ahead = range(batch_idx + 1, batch_idx + 1 + trainer.accumulate_grad_batches)
        steps = trainer.global_step - self._saved_at[0]
        due = bool(self.every_n_steps) and steps >= self.every_n_steps
        if wanted or due or any(_validation_follows(trainer, index) for index in ahead):
            self._save(trainer, self._folder)
        if stop:
            self._stop.raise_if_set(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if a signal has come; several processes cannot: they differ in batches."""
        if self._stop.received is not None and trainer.world_size == 1:
            self._stop.raise_if_set(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; set a snapshot aside from which no step was possible."""
        self._stop.release()
        if isinstance(exception, FloatingPointError) and trainer.is_global_zero:
            self._set_aside(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, before Lightning gives back those that it has taken."""
        self._stop.release()

    def _agree(self, trainer: Trainer) -> tuple[bool, bool]:
        """Whether to save and whether to stop, the same on all ranks."""
        seconds = time.monotonic() - self._saved_at[1]
        late = bool(self.every_minutes) and seconds >= 60 * self.every_minutes
        stop = self._stop.received is not None
        if trainer.world_size == 1:
            return late or stop, stop
        either = trainer.strategy.reduce_boolean_decision(late or stop, all=False)
        return either, either and trainer.strategy.reduce_boolean_decision(stop, all=False)

    def _save(self, trainer: Trainer, folder: Path) -> None:
        """Write a snapshot and remove older ones; a full disk does not end the training.

        Raises:
            FloatingPointError: the weights are not finite; nothing is written.
        """
        self._saved_at = (trainer.global_step, time.monotonic())
        try:
            save_complete(trainer, folder / _NAME.format(trainer.global_step))
        except (OSError, RuntimeError) as error:
            rank_zero_warn(f"no snapshot at step {trainer.global_step}: {error}")
            return
        step = trainer.global_step
        failure = on_rank_zero(trainer, lambda: _remove_others(folder, step, self.keep))
        if failure:
            rank_zero_warn(f"old snapshots stay in {folder}: {failure}")

    def _set_aside(self, step: int) -> None:
        """Weights of 1e36 are finite, and give no finite loss: resuming from them would not end."""
        if self._folder is None:
            return
        path = self._folder / _NAME.format(step)
        if path.is_file():
            aside = path.with_name(f"{path.name}.diverged")
            path.replace(aside)
            rank_zero_warn(
                f"{aside} is set aside: the step after it had no finite loss or gradient"
            )


def _remove_others(folder: Path, step: int, keep: int) -> None:
    """Keep the last ones up to a step; later ones are of a training that was not continued.

    The time of a file says nothing once a clock was set or a folder copied.
    """
    of_step = {path: step_in_name(path) for path in folder.glob("*.ckpt")}
    past = sorted((path for path in of_step if of_step[path] <= step), key=lambda p: of_step[p])
    for path in of_step.keys() - past[-keep:]:
        discard(path)


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation or the end of the epoch comes after a batch, as far as is foreseen."""
    if batch_idx + 1 >= trainer.num_training_batches:
        return True
    every = cast(Any, trainer).val_check_batch
    if every in (None, float("inf")):
        return False
    count = batch_idx
    if trainer.check_val_every_n_epoch is None:  # counted across epochs
        count += trainer.fit_loop.total_batch_idx - trainer.fit_loop.batch_idx
    return bool((count + 1) % every == 0)
