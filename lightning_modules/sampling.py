"""The order of the training images: a function of (seed, epoch), shared out over the processes."""

from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from torch.utils.data import DistributedSampler

from lightning_modules.randomness import derive_seed

__all__ = ["EpochSampler", "SampleKey"]


class SampleKey(NamedTuple):
    """What the sampler asks of the dataset: which image, and in which epoch.

    The epoch travels with every index, so it reaches persistent workers without shared state.
    Whatever else should change while training runs (image size, augmentation strength) can
    be a function of the epoch in the dataset, or one more field here.
    """

    epoch: int
    position: int


class EpochSampler(DistributedSampler[SampleKey]):
    """Shuffles by (seed, epoch) and yields `SampleKey`s; process ``rank`` takes every n-th.

    A `DistributedSampler`, because that type is what keeps Lightning from putting a sampler of
    its own around this one, and because Lightning calls ``set_epoch`` on it. Every process gets
    equally many images: the order is padded with its own beginning.
    """

    def __init__(self, dataset: Sized, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self._count = len(dataset)

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        mine = range(self.rank, self.total_size, self.num_replicas)
        return iter([SampleKey(epoch, order[i % self._count]) for i in mine])
