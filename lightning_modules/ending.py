"""How the processes of a run end: that of rank 0 last, for it has exports and logs to finish."""

import contextlib
import os
import time
from datetime import timedelta

import torch
from lightning.pytorch import Trainer

__all__ = ["end_after_rank_zero"]

_SECONDS = 1020.0  # an export's time limit, and wandb's
_KEY = "mobileone/rank-0-has-ended"
_PARENT = os.getppid()  # now, while it surely lives


def end_after_rank_zero(trainer: Trainer, seconds: float = _SECONDS) -> None:
    """Wait, on ranks above 0, until rank 0 has nothing left to do; on rank 0, let them go.

    Whoever watches over the processes (Lightning's launcher, torchrun, SLURM) ends all of them as
    soon as one has ended with an error. Only where all ranks are known to end may this be called.

    Args:
        trainer: of the run.
        seconds: after which a rank goes without.
    """
    if trainer.world_size == 1:
        return
    environment = trainer._accelerator_connector.cluster_environment
    if not environment.creates_processes_externally:  # Lightning has: rank 0 is the parent
        end = time.monotonic() + seconds
        while trainer.local_rank and os.getppid() == _PARENT and time.monotonic() < end:
            time.sleep(0.05)
        return
    with contextlib.suppress(Exception):  # it may be rank 0 that kept the store
        store = torch.distributed.distributed_c10d._get_default_store()
        if trainer.is_global_zero:
            store.set(_KEY, "1")
        else:
            store.wait([_KEY], timedelta(seconds=seconds))
