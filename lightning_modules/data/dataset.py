"""The datasets of the loaders: samples are a pure function of (seed, epoch, index)."""

import copyreg
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from lightning_modules.checks import label_fault
from lightning_modules.data.image_io import convert, open_image, read_image, why_unreadable
from lightning_modules.data.samplers import SampleKey
from lightning_modules.data.transforms import PhasedTransform
from lightning_modules.errors import UnreadableImageError
from lightning_modules.randomness import derive_seed, isolated_rng
from mobileone.io.suggest import did_you_mean
from mobileone.io.user_modules import import_user_module

__all__ = [
    "ImageClassificationDataset",
    "IterableImageDataset",
    "Sample",
    "SkippedImage",
    "UserDataset",
    "collate",
    "find_function",
    "is_function",
]


# in a function of the user's own: they need their traceback, not the name of an image
_MISTAKES = (LookupError, TypeError, AttributeError, NameError, ImportError)


class SkippedImage(NamedTuple):
    """An unreadable image, which another one replaced."""

    name: str
    reason: str


class Sample(NamedTuple):
    """One transformed image, its class, and the unreadable files that were skipped."""

    image: Tensor
    target: int
    skipped: list[SkippedImage]


@dataclass(frozen=True, eq=False)
class ImageClassificationDataset(Dataset[Sample]):
    """Reads, converts and transforms the images of one split.

    Args:
        source: timm's or torchvision's dataset, without a transform.
        transform: PIL image -> tensor, by epoch; what it draws at random depends on (seed, epoch,
            index) alone, not on the worker, on what was read before, or on global generators.
        mode: Pillow's color mode, see `color_mode`.
        seed: of the augmentation.
        skip_unreadable: let the next readable image of the split replace a broken one
            (usually of the same class, for folders are read in order) instead of raising.
        num_classes: labels from 0 to one less are right.
    """

    source: Any
    transform: PhasedTransform
    mode: str
    seed: int
    skip_unreadable: bool
    num_classes: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """The sample of a `SampleKey`; a plain index means epoch 0.

        Raises:
            UnreadableImageError: the file is broken and ``skip_unreadable`` is off, or no
                file of the split can be read; or its label is not a class.
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
            except UnreadableImageError:  # a wrong label: nothing replaces that
                raise
            except Exception as error:
                if isinstance(self.source, UserDataset) and isinstance(error, _MISTAKES):
                    raise
                name, reason = self.filename(candidate), why_unreadable(error)
                if not self.skip_unreadable:
                    raise UnreadableImageError(
                        f"cannot read image {name} ({reason}). Repair or remove the file, or set "
                        "--data.skip_unreadable true to replace it by another image."
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
            with open_image(image) as file:
                return read_image(file, self.mode), target
        # past timm's ImageDataset, which would replace a broken image without saying so
        reader = self.source.reader
        if isinstance(reader, ReaderImageFolder):
            path, target = reader.samples[index]
            file = open_image(path)
        else:
            file, target = reader[index]
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
    """Images (N, C, H, W), targets (N,) and the unreadable files of the complete batch."""
    images = default_collate([sample.image for sample in samples])
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.long)
    return images, targets, [file for sample in samples for file in sample.skipped]


# timm's has a lock that only forked processes can share: a worker gets a count of its own
copyreg.pickle(SharedCount, lambda count: (SharedCount, (count.value,)))


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
        self.source.set_epoch(epoch)  # of this process's reader
        for position, (image, target) in enumerate(self.source):
            if fault := label_fault(target, self.num_classes):
                raise UnreadableImageError(f"image {position} of worker {worker_id} {fault}")
            with isolated_rng(derive_seed(self.seed, epoch, worker_id, position)):
                transformed = self.transform.at(epoch)(image)
            yield Sample(transformed, int(target), [])


ImageOrPath = Image.Image | str | PathLike[str]

_EXAMPLE = (
    'A function (root, split) must return, for "train", "val" and "test" (None if there are no '
    "images to test), a dataset with len(dataset), dataset[0] -> (Pillow image or path, label) and "
    "dataset.classes, the names in the order of the labels."
)


def is_function(name: str) -> bool:
    """Whether a dataset's name is that of a function, ``module:function``."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def find_function(name: str) -> Callable[[Path | None, str], Any]:
    """Import the function of the user's own that ``--data.dataset my_data:make_split`` names.

        def make_split(root, split):  # split is "train", "val" or "test"
            return torchvision.datasets.ImageFolder(root / split)

    It returns a map-style dataset: ``len(dataset)``; ``dataset[index] -> (image, label)``, a Pillow
    image or the path of one, before any transform, and an integer; and ``dataset.classes``, the
    names in the order of the labels. For "test" it may return None: then the validation split is
    tested, as for folders without test/.

    Raises:
        ValueError: there is no such module, or nothing in it that can be called by that name.
    """
    module_name, _, function_name = name.partition(":")
    module = import_user_module(module_name, "data.dataset")
    function = getattr(module, function_name, None)
    if callable(function):
        try:
            inspect.signature(function).bind(None, "train")
        except TypeError as error:
            wrong = f"does not take (root, split): {error}."
        else:
            return function
    elif function is None:
        wrong = f"does not exist{did_you_mean(function_name, vars(module)) or '.'}"
    else:
        wrong = f"is not a function, but {function!r}."
    raise ValueError(f"dataset={name!r}: in {module.__file__} {function_name} {wrong} {_EXAMPLE}")


class UserDataset(Dataset[tuple[ImageOrPath, int]]):
    """What the user's function returned for a split, checked, its labels being indices of classes.

    Args:
        samples: what was returned.
        name: of the function and the split, for messages.
        class_map: class name -> index; None for the order of ``samples.classes``.

    Attributes:
        class_to_idx: class name -> index, of the classes of this split.

    Raises:
        ValueError: it is not such a dataset, or its first sample is wrong.
    """

    def __init__(self, samples: Any, name: str, class_map: dict[str, int] | None = None) -> None:
        if fault := _fault_of_dataset(samples):
            raise ValueError(f"{name} {fault}. {_EXAMPLE}")
        order = class_map or {c: i for i, c in enumerate(samples.classes)}
        self.class_to_idx = {c: order[c] for c in samples.classes}
        self._indices = [order[c] for c in samples.classes]
        self._samples = samples
        self._name = name
        if fault := _fault_of_sample(samples[0]):
            raise ValueError(f"sample 0 of {name} {fault}. {_EXAMPLE}")
        self[0]  # for its label

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[ImageOrPath, int]:
        """The image, or its path, and the index of its class.

        Raises:
            UnreadableImageError: its label is not an index of ``samples.classes``.
        """
        image, label = self._samples[index]
        if fault := label_fault(label, len(self._indices)):
            raise UnreadableImageError(f"image {self.filename(index)} {fault}")
        return image, self._indices[int(label)]

    def filename(self, index: int) -> str:
        """The number of a sample and, if it is known, its path."""
        path: Any = None
        with suppress(Exception):  # it is asked for where another error is reported
            path = self._samples[index][0]
        known = f" ({path})" if isinstance(path, str | PathLike) else ""
        return f"{index}{known} of {self._name}"


def _fault_of_dataset(samples: Any) -> str | None:
    kind = type(samples)
    for method in ("__len__", "__getitem__"):
        if not callable(getattr(kind, method, None)):
            return f"returned a {kind.__name__}, which has no {method}"
    classes = getattr(samples, "classes", None)
    if not isinstance(classes, Sequence) or not all(isinstance(c, str) for c in classes):
        return f"returned a {kind.__name__} whose `classes` is {classes!r}, not a list of names"
    if len(set(classes)) < len(classes) or not classes:
        return f"returned a {kind.__name__} whose `classes` {list(classes)!r} are empty or repeated"
    return None if len(samples) else f"returned a {kind.__name__} without images"


def _fault_of_sample(sample: Any) -> str | None:
    if not isinstance(sample, Sequence) or len(sample) != 2:
        return f"is a {type(sample).__name__}, not a pair (image, label)"
    image = sample[0]
    if isinstance(image, str | PathLike):
        return (
            None if Path(image).is_file() else f"has the image {str(image)!r}, which is not a file"
        )
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        return f"has a {kind} as its image: leave transforms out, they are the data module's"
    return None
