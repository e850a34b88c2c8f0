"""What a training notes in its run folder, and what all ranks must agree on before."""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_modules.run.folder import RunFolder

__all__ = ["RunRecords"]


class RunRecords(SaveConfigCallback):
    """Keep a fit's configuration, once nothing can go wrong with it, and point `latest` to it.

    Attributes:
        began: Whether training has begun, after all that can be refused.
    """

    began: bool = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: the checkpoint to resume may not fit, and the run's file is good."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all ranks resume from one file; the trainer knows it only now.

        Raises:
            RuntimeError: They do not.
        """
        mine = str(trainer.ckpt_path)
        if (first := trainer.strategy.broadcast(mine)) != mine:
            raise RuntimeError(
                f"rank {trainer.global_rank} would resume from {mine}, rank 0 from {first}: put "
                "--run.root on a file system that all nodes see"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration to `<run>/config.yaml` and the loggers; log in every epoch."""
        self.began = True
        _log_in_every_epoch(trainer)
        if not trainer.is_global_zero:
            return
        run = RunFolder.read(Path(trainer.default_root_dir))
        run.write_config(self.parser.dump(self.config, skip_none=False))
        run.mark(finished=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that nothing is left to do: a run of this name with other options may begin."""
        if trainer.is_global_zero:
            RunFolder.read(Path(trainer.default_root_dir)).mark(finished=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now there is a result: let `latest` link to this run."""
        if trainer.is_global_zero:
            RunFolder.read(Path(trainer.default_root_dir)).make_latest()


def _log_in_every_epoch(trainer: Trainer) -> None:
    """An epoch shorter than the interval would leave no learning rate in the logs."""
    interval = cast(Any, trainer)
    batches = int(min(trainer.num_training_batches, interval.log_every_n_steps))
    interval.log_every_n_steps = max(1, batches)
