"""A line an epoch: the log that remains when the progress bar is gone, or was never there."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["EpochLines", "four_digits"]


def four_digits(value: float) -> str:
    """A metric for people: 0.9722, 12.3457, 9.751e+04."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"


class EpochLines(Callback):
    """Print epoch, step, metrics and seconds at the end of every training epoch.

    Epochs count from 0, as in Lightning's progress bar, names of files and logs.
    In a terminal the lines are above the progress bar; in a log file they are the progress.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a run that is resumed within an epoch."""
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that the metrics of a validation are new."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        if not trainer.is_global_zero:
            return
        shown = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name == "train/loss_epoch" or (self._validated and name.startswith("val/"))
        }
        if not shown:  # resumed at the end of the epoch
            return
        metrics = "  ".join(
            f"{name} {four_digits(float(value))}" for name, value in sorted(shown.items())
        )
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs - 1}"
        line = (
            f"epoch {trainer.current_epoch}{epochs}  step {trainer.global_step}  {metrics}  "
            f"{time.monotonic() - self._started:.0f} s"
        )
        bar = trainer.progress_bar_callback
        if bar is None:
            print(line, flush=True)
        else:
            bar.print(line)
