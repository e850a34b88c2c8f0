"""What all trainings share: seeds, the guard against NaN, one optimizer and its schedules."""

import inspect
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.checks import check_model_name
from lightning_modules.randomness import derive_seed, resolve_seed
from lightning_modules.recipe.nonfinite_guard import NonFiniteGuard
from lightning_modules.recipe.optimizers import total_steps

__all__ = ["TrainingModule"]

_SEED = "dropout_seed"  # in a checkpoint


class TrainingModule(LightningModule):
    """A network that is trained by one optimizer, with schedules that advance at each step.

    A subclass has at least the arguments `model` (timm name), `pretrained`, `skip_nonfinite` and
    `seed`, assigns the network to `self.model`, and defines `make_optimizer` and `make_schedules`.
    All arguments of all subclasses are in `self.hparams`, and so in every checkpoint.

    What is random in a batch (dropout, stochastic depth, mixup) draws from torch's generator, which
    is seeded before each batch by (seed, rank, epoch, batch), so that a resumed run repeats the
    uninterrupted one bit for bit.

    Attributes:
        model: the network.

    Raises:
        ValueError: an unknown name (similar ones are listed) or a value out of its range.
    """

    model: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        # the command line gives Lightning what a subclass takes, not what it hands on by itself
        frame = cast(FrameType, inspect.currentframe())
        for arguments in collect_init_args(frame, [], classes=(TrainingModule,)):
            for name, value in arguments.items():
                self.hparams.setdefault(name, value)
        check_model_name(self.hparams["model"])
        self._guard = NonFiniteGuard(self.hparams["skip_nonfinite"])
        self._restored_seed: int | None = None

    @property
    def seed(self) -> int:
        """The seed in force: the argument, else the checkpoint's, else the run's, else 0."""
        return resolve_seed(self.hparams["seed"], self._restored_seed)

    def make_optimizer(self) -> Optimizer:
        """Return the optimizer of `self.model`; the training data are loaded already."""
        raise NotImplementedError

    def make_schedules(self, optimizer: Optimizer, total_steps: int) -> list[LRScheduler]:
        """Return the schedules; each advances after every optimizer step.

        Args:
            optimizer: of `make_optimizer`.
            total_steps: optimizer steps of the complete training.
        """
        raise NotImplementedError

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """Return the optimizer and its schedules.

        Raises:
            ValueError: the trainer runs without end.
        """
        steps = total_steps(self.trainer)  # loads the data, which the lines below need
        optimizer = self.make_optimizer()
        schedules = self.make_schedules(optimizer, steps)
        # LearningRateMonitor logs the learning rate under the name of every schedule it finds, so
        # a name of its own for the weight decay's would be a wrong label
        return [optimizer], [{"scheduler": s, "interval": "step", "name": "lr"} for s in schedules]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the randomness of this batch independent of what was drawn before."""
        torch.manual_seed(derive_seed(self.seed, self.global_rank, self.current_epoch, batch_idx))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._guard.save_buffers(self.model)

    def log_step(self, loss: Tensor, batch_size: int) -> Tensor:
        """Log `train/loss`, if it is finite, `lr` and `weight_decay`.

        Args:
            loss: of this batch, a scalar.
            batch_size: number of images.

        Returns:
            What `training_step` has to return.
        """
        loss = self._guard.check_loss(loss)
        if self._guard.loss_is_finite:
            self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        groups = self.trainer.optimizers[0].param_groups
        for name in ("lr", "weight_decay"):
            self.log(name, max(float(group[name]) for group in groups), batch_size=batch_size)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the step out if its loss or a gradient is not finite, or stop.

        Raises:
            FloatingPointError: it is not (see `skip_nonfinite`). The weights are still those before
                the step.
        """
        self._guard.check_gradients(self, optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed; the network is rebuilt without a download, for the weights are here."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["pretrained"] = False
        checkpoint[_SEED] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the seed of the checkpoint."""
        self._restored_seed = checkpoint.get(_SEED)
