"""Lightning's trainer, as the command line builds it."""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.plugins.environments import LightningEnvironment
from timm.layers import convert_sync_batchnorm
from torch import nn

__all__ = ["IntLimitTrainer", "TimmSyncBatchNorm", "end_with_rank_zero", "wait_for_rank_zero"]


class IntLimitTrainer(Trainer):
    """Lightning's `Trainer`, whose limit of 1 is one batch and of 1.0 all of them.

    The parser takes the first type of a union that fits. Lightning writes `Optional[Union[int,
    float]]`, and `typing`, which calls unions equal in any order, may return an
    `Optional[Union[float, int]]` that it made for another module before: 1 becomes 1.0.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        """Take `lightning.pytorch.Trainer`'s arguments.

        Args:
            limit_train_batches: Training batches an epoch: a count, or a fraction with a point.
            limit_val_batches: Validation batches: a count, or a fraction with a point.
            limit_test_batches: Test batches: a count, or a fraction with a point.
            limit_predict_batches: Prediction batches: a count, or a fraction with a point.
            **kwargs: Its other arguments.

        Raises:
            MisconfigurationException: A value is out of its range, for example a fraction over 1.
        """
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )


class TimmSyncBatchNorm(LayerSync):
    """What `Trainer(sync_batchnorm=True)` does, by timm's conversion.

    torch's turns a `BatchNormAct2d` into a plain SyncBatchNorm and so drops its activation without
    a word. MobileOne's norms have none, but those of most other models do.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert every BatchNorm."""
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the layers as they are: they compute the same outside a process group."""
        return model


_SECONDS = 1020.0  # an export's time limit, and wandb's
_KEY = "mobileone/rank-0-has-ended"
_LAUNCHER = "MOBILEONE_RANK_ZERO"  # a variable: process id of the one that has started this one
_PATIENCE = 10.0  # seconds in which a rank ends by itself, or with an error that says more


def end_with_rank_zero(trainer: Trainer) -> None:
    """On ranks that Lightning starts, end when rank 0 was killed: they would wait to connect.

    That takes half an hour. Other launchers end the ranks themselves.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, LightningEnvironment):
        return
    if not environment.creates_processes_externally:  # this process will
        os.environ[_LAUNCHER] = str(os.getpid())
    elif _LAUNCHER in os.environ:
        threading.Thread(target=_watch_rank_zero, daemon=True).start()


def _watch_rank_zero() -> None:
    while os.getppid() == int(os.environ[_LAUNCHER]):
        time.sleep(0.5)
    time.sleep(_PATIENCE)
    print("rank 0 has ended, and so does this rank", file=sys.stderr, flush=True)
    os._exit(1)


def wait_for_rank_zero(trainer: Trainer, seconds: float = _SECONDS) -> None:
    """Wait, on ranks above 0, until rank 0 has nothing left to do, and end; on rank 0, go on.

    The launcher of the processes (Lightning's launcher, torchrun, SLURM) kills all of them as soon
    as one has ended with an error, and rank 0 may still be closing its files: how the run ended is
    for its exit status alone to say. Only where all ranks are known to end may this be called.

    Args:
        trainer: of the run.
        seconds: after which a rank goes on without.

    Raises:
        SystemExit: On ranks above 0, with status 0.
    """
    if trainer.world_size == 1:
        return
    with contextlib.suppress(Exception):  # it may be rank 0 that kept the store
        store = torch.distributed.distributed_c10d._get_default_store()
        if trainer.is_global_zero:
            store.set(_KEY, "1")
        else:
            store.wait([_KEY], timedelta(seconds=seconds))
            sys.exit(0)
