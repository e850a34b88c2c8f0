"""A DataLoader that starts when the first batch is asked for, and reports unreadable files."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.randomness import derive_seed
from lightning_modules.samples import collate
from lightning_modules.streams import ImageStream

__all__ = ["LazyDataLoader", "image_loader"]

_NAMES_SHOWN = 5


class LazyDataLoader(DataLoader):
    """Starts its workers at the first ``next``, not at ``iter``.

    Lightning creates the first iterator of a fit before it tells the sampler the epoch, and after
    a resume even before it knows the epoch itself; a plain loader would have its workers fetch
    the wrong epoch's images by then. Batches are (images, targets); the third part that
    `collate` adds stays here and becomes one warning a pass.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        unreadable: dict[str, str] = {}
        last = _length(self) - 1
        try:
            for position, (images, targets, skipped) in enumerate(super().__iter__()):
                unreadable.update(skipped)
                if position == last:  # a consumer that counts batches never asks for one more
                    _report(unreadable)
                yield images, targets
        finally:
            _report(unreadable)


def image_loader(
    dataset: Any, seed: int, num_workers: int, persistent_workers: bool, **options: Any
) -> LazyDataLoader:
    """A `LazyDataLoader` that leaves the global random generators alone.

    Args:
        dataset: `ImageSamples` or `ImageStream`.
        seed: of the workers' base seed, which would otherwise be drawn from torch's generator.
        num_workers: processes beside this one.
        persistent_workers: keep them from one epoch to the next; ignored without workers.
        options: batch_size, sampler, drop_last, pin_memory as `DataLoader` takes them.
    """
    loader = LazyDataLoader(
        dataset,
        num_workers=num_workers,
        persistent_workers=persistent_workers and num_workers > 0,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(derive_seed(seed)),
        **options,
    )
    if isinstance(dataset, ImageStream):  # has no sampler of its own: Lightning tells this object
        loader.sampler.set_epoch = dataset.set_epoch  # type: ignore[attr-defined]
    return loader


def _length(loader: DataLoader) -> int:
    try:
        return len(loader)
    except TypeError:  # a stream of unknown length
        return 0


def _report(unreadable: dict[str, str]) -> None:
    if not unreadable:
        return
    shown = [f"{name} ({reason})" for name, reason in sorted(unreadable.items())[:_NAMES_SHOWN]]
    more = len(unreadable) - len(shown)
    warnings.warn(
        f"skip_unreadable: {len(unreadable)} unreadable images were replaced by others in this "
        f"pass: {'; '.join(shown)}" + (f"; and {more} more" if more else ""),
        stacklevel=2,
    )
    unreadable.clear()
