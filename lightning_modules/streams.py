"""Streaming datasets (WebDataset, TFDS, Hugging Face streaming) that timm reads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lightning_modules.curriculum import PhasedTransform
from lightning_modules.data.dataset import Sample
from lightning_modules.randomness import derive_seed, isolated_rng

__all__ = ["ImageStream"]


class ImageStream(IterableDataset[Sample]):
    """Transforms the images of a timm `IterableImageDataset`.

    timm's reader shuffles and shares out the shards; it drops images that it cannot decode. The
    augmentation is a function of (seed, epoch, worker, position), so a stream is reproducible
    for a fixed number of workers only.
    """

    def __init__(
        self, source: Any, transform: PhasedTransform, seed: int, num_workers: int
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by the workers
        source.set_loader_cfg(num_workers=num_workers)

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle and the augmentation of the next pass, in every worker."""
        self._epoch.fill_(epoch)
        self.source.set_epoch(epoch)

    def __len__(self) -> int:
        length = len(self.source)
        if length == 0:  # timm's way to say that it does not know
            raise TypeError("the length of this stream is unknown")
        return length

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        worker_id, epoch = (worker.id if worker else 0), int(self._epoch)
        for position, (image, target) in enumerate(self.source):
            with isolated_rng(derive_seed(self.seed, epoch, worker_id, position)):
                transformed = self.transform.at(epoch)(image)
            yield Sample(transformed, int(target), [])
