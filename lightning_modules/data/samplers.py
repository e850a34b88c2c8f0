"""The order of the images and how the processes share them: for training by (seed, epoch)."""

from collections.abc import Iterator, Sequence, Sized
from typing import NamedTuple

import torch
from torch.utils.data import DistributedSampler

from lightning_modules.randomness import derive_seed

__all__ = ["EpochSampler", "SampleKey", "ShardSampler"]


class SampleKey(NamedTuple):
    """What the sampler requests from the dataset: which image, and in which epoch.

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

    Attributes:
        start: how many of this process's images the next pass leaves out at the beginning. The
            length does not change with it: it is that of a complete epoch.
    """

    def __init__(self, dataset: Sized, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self._count = len(dataset)
        self.start = 0

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        mine = range(self.rank, self.total_size, self.num_replicas)[self.start :]
        return iter([SampleKey(epoch, order[i % self._count]) for i in mine])


class ShardSampler(EpochSampler):
    """Shuffles images that are in shards, and reads no shard all over the epoch.

    The shards are put in an order by (seed, epoch), and each process takes its own stretch of
    the row of images which that makes; the stretches are equally long (padded as in
    `EpochSampler`), so that one may begin within a shard. Images are shuffled within windows of the
    stretch, as WebDataset's shuffle buffer does. A process thus reads about its share of the
    bytes, a few neighboring shards at a time.

    Args:
        dataset: the images, in the order of the shards.
        lengths: images of each shard.
        seed: of the order.
        num_replicas: processes.
        rank: of this process.
        window: images that are shuffled among each other; timm's buffer holds as many.
    """

    def __init__(
        self,
        dataset: Sized,
        lengths: Sequence[int],
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        window: int = 8192,
    ) -> None:
        super().__init__(dataset, seed, num_replicas, rank)
        self._lengths = torch.tensor(lengths)
        self._window = window

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        ends = self._lengths.cumsum(0)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        row = torch.cat(
            [
                torch.arange(int(ends[shard] - self._lengths[shard]), int(ends[shard]))
                for shard in torch.randperm(len(ends), generator=generator)
            ]
        )
        first = self.rank * self.num_samples
        stretch = row[torch.arange(first, first + self.num_samples) % self._count]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, self.rank))
        mine = [
            index
            for part in stretch.split(self._window)
            for index in part[torch.randperm(len(part), generator=generator)].tolist()
        ]
        return iter([SampleKey(epoch, index) for index in mine[self.start :]])
