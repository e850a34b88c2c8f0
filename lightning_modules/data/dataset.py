"""A map-style dataset whose samples are a pure function of (seed, epoch, index)."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from lightning_modules.checks import label_fault
from lightning_modules.data.image_io import (
    convert,
    read_image,
    why_unreadable,
)
from lightning_modules.data.samplers import SampleKey
from lightning_modules.data.transforms import PhasedTransform
from lightning_modules.data.user_dataset import UserDataset
from lightning_modules.errors import UnreadableImageError
from lightning_modules.randomness import derive_seed, isolated_rng

__all__ = [
    "ImageClassificationDataset",
    "IterableImageDataset",
    "Sample",
    "SkippedImage",
    "collate",
]


# in a function of the user's own: they need their traceback, not the name of an image
_MISTAKES = (LookupError, TypeError, AttributeError, NameError, ImportError)


class SkippedImage(NamedTuple):
    """An image that another one stood in for."""

    name: str
    reason: str


class Sample(NamedTuple):
    """One transformed image, its class, and the unreadable files passed over to find it."""

    image: Tensor
    target: int
    skipped: list[SkippedImage]


class ImageClassificationDataset(Dataset[Sample]):
    """Reads, converts and transforms the images of one split.

    Args:
        source: timm's or torchvision's dataset, without a transform.
        transform: PIL image -> tensor, by epoch; what it draws at random depends on (seed, epoch,
            index) alone, not on the worker, on what was read before, or on global generators.
        mode: Pillow's color mode, see `color_mode`.
        seed: of the augmentation.
        skip_unreadable: let the next readable image of the split stand in for a broken one
            (usually of the same class, for folders are read in order) instead of raising.
        num_classes: labels from 0 to one less are right.
    """

    def __init__(
        self,
        source: Any,
        transform: PhasedTransform,
        mode: str,
        seed: int,
        skip_unreadable: bool,
        num_classes: int,
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """The sample of a `SampleKey`; a plain index means epoch 0.

        Raises:
            UnreadableImageError: the file is broken and ``skip_unreadable`` is off, or no
                file of the split can be read; or it has a label that is no class.
        """
        epoch, index = key if isinstance(key, SampleKey) else SampleKey(0, key)
        image, target, skipped = self._first_readable(index)
        with isolated_rng(derive_seed(self.seed, epoch, index)):
            return Sample(self.transform.at(epoch)(image), target, skipped)

    def _first_readable(self, index: int) -> tuple[Image.Image, int, list[SkippedImage]]:
        skipped: list[SkippedImage] = []
        for candidate in chain(range(index, len(self)), range(index)):
            try:
                image, target = self._read(candidate)
                if fault := label_fault(target, self.num_classes):
                    raise UnreadableImageError(f"image {self.filename(candidate)} {fault}")
                return image, int(target), skipped
            except UnreadableImageError:  # a wrong label: nothing stands in for that
                raise
            except Exception as error:
                if isinstance(self.source, UserDataset) and isinstance(error, _MISTAKES):
                    raise
                name, reason = self.filename(candidate), why_unreadable(error)
                if not self.skip_unreadable:
                    raise UnreadableImageError(
                        f"cannot read image {name} ({reason}). Repair or remove the file, or set "
                        "--data.skip_unreadable true to let another image stand in for it."
                    ) from error
                skipped.append(SkippedImage(name, reason))
        raise UnreadableImageError(
            f"none of the {len(self)} images of this split can be read, for example "
            f"{skipped[0].name} ({skipped[0].reason})."
        )

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        if not isinstance(self.source, ImageDataset):  # torchvision's or the user's own
            image, target = self.source[index]
            if isinstance(image, Image.Image):
                return convert(image, self.mode), target
            with Path(image).open("rb") as file:
                return read_image(file, self.mode), target
        # past timm's ImageDataset, which would replace a broken image without saying so
        file, target = self.source.reader[index]
        with file:
            return read_image(file, self.mode), target

    def filename(self, index: int) -> str:
        """The path of an image as far as the dataset knows it, for messages."""
        if isinstance(self.source, ImageDataset):
            return str(self.source.filename(index, absolute=True))
        if isinstance(self.source, UserDataset):
            return self.source.filename(index)
        samples = getattr(self.source, "samples", None)  # torchvision's folders
        return str(samples[index][0]) if samples else f"number {index} of {self.source}"


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[SkippedImage]]:
    """Images (N, C, H, W), targets (N,) and the unreadable files of the whole batch."""
    images = default_collate([sample.image for sample in samples])
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.long)
    return images, targets, [file for sample in samples for file in sample.skipped]


class IterableImageDataset(IterableDataset[Sample]):
    """Transforms the images of a timm `IterableImageDataset`.

    timm's reader shuffles and shares out the shards; it drops images that it cannot decode. The
    augmentation is a function of (seed, epoch, worker, position), so a stream is reproducible
    for a fixed number of workers only.
    """

    def __init__(
        self,
        source: Any,
        transform: PhasedTransform,
        seed: int,
        num_workers: int,
        num_classes: int,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.num_classes = num_classes
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
            if fault := label_fault(target, self.num_classes):
                raise UnreadableImageError(f"image {position} of worker {worker_id} {fault}")
            with isolated_rng(derive_seed(self.seed, epoch, worker_id, position)):
                transformed = self.transform.at(epoch)(image)
            yield Sample(transformed, int(target), [])
