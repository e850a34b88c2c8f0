"""What a data module needs so that a resumed run sees the batches that it would have seen."""

import math
from collections.abc import Sized
from typing import Any

import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.data.dataloader import DeferredStartDataLoader, ResumableDataLoader
from lightning_modules.data.dataset import collate
from lightning_modules.data.workers import worker_options
from lightning_modules.randomness import derive_seed, resolve_seed

__all__ = ["ResumableData"]


class ResumableData(LightningDataModule):
    """Loaders, a seed that is kept in checkpoints, and the place within the epoch that is resumed.

    Args:
        batch_size: images a batch and device.
        num_workers: processes a loader; None for what the machine suggests, 8 at most.
        persistent_workers: keep them from one epoch to the next.
        seed: of order and augmentation; None for the checkpoint's, else the run's, else 0.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, batch_size: int, num_workers: int | None, persistent_workers: bool, seed: int | None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1 (images per device).")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be 0 or more, or null.")
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._persistent_workers = persistent_workers
        self._seed = seed
        self._restored_seed: int | None = None

    @property
    def seed(self) -> int:
        """The seed in force: the argument, else the checkpoint's, else the run's, else 0."""
        return resolve_seed(self._seed, self._restored_seed)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to see the same batches."""
        return {"seed": self.seed, "share": self._share()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's seed, unless one was given as an argument."""
        self._restored_seed = int(state_dict["seed"])
        if self._seed is not None and self._seed != self._restored_seed:
            rank_zero_warn(
                f"data seed {self._seed} differs from the checkpoint's {self._restored_seed}: the "
                "images will come in another order than in the run that is resumed."
            )
        before, now = state_dict.get("share", self._share()), self._share()
        if before != now:
            rank_zero_warn(
                f"the checkpoint was made with {_described(before)}, this run has "
                f"{_described(now)}: if it was made within an epoch, some images of that epoch "
                "come twice or are left out; later epochs are complete."
            )

    def _share(self) -> dict[str, int]:
        """What decides, with the seed, which images a step of an epoch takes."""
        return {"processes": self._processes, "batch_size": self._batch_size}

    @property
    def _processes(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _check_count(self, images: int, split: str, drop_last: bool) -> None:
        """Raise ValueError if there are too few images for the processes, or for a batch."""
        share = math.ceil(images / self._processes)
        if split == "train" and drop_last and share < self._batch_size:
            raise ValueError(
                f"batch_size={self._batch_size} is larger than the {share} training images of one "
                "process, and incomplete batches are left out, so nothing would be trained. Lower "
                "--data.batch_size, or set --data.drop_last false if there is that option."
            )
        if split != "train" and images < self._processes:
            raise ValueError(
                f"{split} has {images} images for {self._processes} processes, and each needs at "
                "least one. Add images, or lower --trainer.devices."
            )

    def _workers(self) -> int:
        if self._num_workers is not None:
            return self._num_workers
        processes = self.trainer.num_devices if self.trainer else 1
        return min(8, suggested_max_num_workers(processes))

    def _loader(
        self, dataset: Any, resumable: bool = False, **options: Any
    ) -> DeferredStartDataLoader:
        """A loader that leaves the global random generators alone.

        Args:
            dataset: of samples that `collate` takes, unless another ``collate_fn`` is given.
            resumable: whether it continues within an epoch; the sampler is an `EpochSampler`.
            options: of `DataLoader`, for example sampler and drop_last.
        """
        workers = self._workers()
        options = {
            "dataset": dataset,
            "batch_size": self._batch_size,
            **worker_options(workers),
            "persistent_workers": self._persistent_workers and workers > 0,
            "collate_fn": collate,
            # of the workers' base seed, which would otherwise be drawn from torch's generator
            "generator": torch.Generator().manual_seed(derive_seed(self.seed)),
            "pin_memory": self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            **options,
        }
        if resumable:
            return ResumableDataLoader(batches_done=self._batches_done, **options)
        return DeferredStartDataLoader(**options)

    def _evaluation_sampler(self, dataset: Sized) -> UnrepeatedDistributedSampler | None:
        """Each image once over all processes; None where one process takes them in order.

        torch's sampler (and Lightning, which puts it around any other) repeats images to give every
        process equally many: a metric that is summed over the processes would not be exact. That
        some processes have one batch less does no harm where each has one: DistributedDataParallel
        exchanges buffers before the first batch without gradients only, and metrics are summed
        after the last.
        """
        if self._processes == 1:
            return None
        share = {"num_replicas": self._processes, "rank": self._rank}
        return UnrepeatedDistributedSampler(dataset, **share, shuffle=False)

    def _batches_done(self) -> int:
        """How many batches of the present epoch come before the resumed checkpoint."""
        if self.trainer is None or not self.trainer.fit_loop.is_resuming:
            return 0
        return self.trainer.fit_loop.batch_idx + 1


def _described(share: dict[str, int]) -> str:
    return f"{share['processes']} process(es) and batches of {share['batch_size']}"
