"""A data module as one process of several sees it, without starting them."""

from types import SimpleNamespace

import torch

__all__ = ["on_rank"]


def on_rank(data, rank=0, processes=1, batches_done=0):
    """The data module, as if a trainer held it; resumed after some batches of an epoch if given."""
    data.trainer = SimpleNamespace(
        world_size=processes,
        global_rank=rank,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(is_resuming=batches_done > 0, batch_idx=batches_done - 1),
    )
    return data
