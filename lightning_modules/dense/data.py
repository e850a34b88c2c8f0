"""The data modules of segmentation and detection: generated shapes, Pascal VOC, COCO."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_modules.data.base import ResumableData
from lightning_modules.data.samplers import EpochSampler, SampleKey
from lightning_modules.data.transforms import resolve_config
from lightning_modules.dense.shapes import CLASSES, Picture, Shapes
from lightning_modules.dense.sources import VOC_CLASSES, CocoBoxes, VocMasks
from lightning_modules.randomness import derive_seed, isolated_rng
from mobileone.io.atomic import directory_lock

__all__ = ["DetectionData", "SegmentationData"]


class _DenseData(ResumableData):
    """Loaders of a data set's two splits; subclasses read them.

    Every training batch is a function of (seed, epoch, position): the same for any number of
    workers, and the same in a run that was resumed, within an epoch too.

    Args:
        dataset: "shapes" (generated), or the subclass's name for real images.
        root: where real images are.
        size: side in pixels: of generated images, and of all that are segmented.
        count: generated training images; a quarter as many for validation.
        batch_size: images a batch and device.
        num_workers: processes a loader.
        seed: of order and augmentation; None for the one of the checkpoint that is resumed, else
            the run's (`seed_everything`), else 0.

    Attributes:
        class_names: of the labels, `background` first.

    Raises:
        ValueError: an unknown data set, or a number out of range.
    """

    real: str
    stacked: bool  # whether all images of a batch have one size
    class_names: tuple[str, ...]
    # of a subclass: names of the classes below a root; a split there; what makes a sample of it
    _real_classes: Callable[[str], tuple[str, ...]]
    _read: Callable[[str, bool], Dataset[Picture]]
    _transform: Callable[[bool], Callable[[Picture], Any]]

    def __init__(
        self,
        dataset: str = "shapes",
        root: str | None = None,
        *,
        size: int = 320,
        count: int = 512,
        batch_size: int = 16,
        num_workers: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, persistent_workers=True, seed=seed)
        if size < 32 or size % 32 or count < 1:
            raise ValueError(f"size={size} must be a multiple of 32, and count={count} at least 1.")
        if dataset not in ("shapes", self.real):
            raise ValueError(f"dataset={dataset!r} is unknown. Use one of shapes, {self.real}.")
        if dataset == "shapes" and root is not None:
            raise ValueError(f"--data.root is for dataset={self.real!r}; shapes reads no files.")
        if dataset != "shapes" and root is None:
            raise ValueError(f"dataset={dataset!r} needs --data.root, the folder where it is.")
        self._root = None if root is None else str(root)
        self.size, self._count = size, count
        self._sources: dict[bool, Any] = {}
        self.class_names = CLASSES if root is None else self._real_classes(self._root or "")

    def setup(self, stage: str) -> None:
        """Read what the stage needs, and check it."""
        for train in (True, False) if stage == "fit" else (False,):
            self._check_count(len(self.split(train)), "train" if train else "val", drop_last=True)

    def split(self, train: bool) -> "_Samples":
        """The training or the validation images with their targets."""
        if train not in self._sources:
            count = self._count if train else max(1, self._count // 4)
            self._sources[train] = (
                Shapes(count, self.size, seed=int(train))
                if self._root is None
                else self._read(self._root, train)
            )
        augment = train and self._root is not None
        return _Samples(self._sources[train], self._transform(augment), self.seed)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, without an incomplete last one."""
        sampler = EpochSampler(self.split(True), self.seed, self._processes, self._rank)
        return self._loader_of(True, sampler=sampler, drop_last=True, resumable=True)

    def val_dataloader(self) -> DataLoader:
        """Every validation image, in order."""
        return self._loader_of(False, sampler=self._evaluation_sampler(self.split(False)))

    def _loader_of(self, train: bool, **options: Any) -> DataLoader:
        collate = partial(_collate, self.stacked)
        return self._loader(self.split(train), collate_fn=collate, **options)


class SegmentationData(_DenseData):
    """Images (N, 3, S, S), normalized, and masks (N, S, S) of class indices.

    Training images of VOC are cropped and mirrored at random, others resized.

    Args:
        model: timm name, whose normalization is used.
        download: fetch VOC.
        options: of the data set "shapes" (generated) or "voc" (Pascal VOC 2012 in torchvision's
            layout; `root` is the folder above VOCdevkit).

    Raises:
        ValueError: an unknown data set or model, or a number out of range.
    """

    real = "voc"
    stacked = True

    def __init__(
        self, model: str = "mobileone_s0", *, download: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self._config = resolve_config(model)
        self._download = download

    def prepare_data(self) -> None:
        """Fetch VOC, if that is wanted; of several processes the first does, the others wait."""
        if self._root is not None and self._download:
            with directory_lock(Path(self._root).expanduser(), patience=math.inf):
                VocMasks(self._root, "train", download=True)

    def setup(self, stage: str) -> None:
        """Read what the stage needs, and check it."""
        self.prepare_data()
        super().setup(stage)

    def _real_classes(self, root: str) -> tuple[str, ...]:
        return VOC_CLASSES

    def _read(self, root: str, train: bool) -> Dataset:
        return VocMasks(root, "train" if train else "val")

    def _transform(self, augment: bool) -> v2.Compose:
        square = (self.size, self.size)
        random = [v2.RandomResizedCrop(square, scale=(0.25, 1.0)), v2.RandomHorizontalFlip()]
        normalize = v2.Normalize(list(self._config["mean"]), list(self._config["std"]))
        place = random if augment else [v2.Resize(square)]
        return v2.Compose([*place, *_FLOAT, normalize, v2.ToPureTensor(), _image_and_mask])


class DetectionData(_DenseData):
    """A list of images (3, H, W) in 0..1, and a list of targets.

    A target has `boxes` (B, 4), `labels` (B,) and `iscrowd` (B,). Training images of COCO are
    cropped around objects and mirrored at random. The data set is "shapes" (generated) or "coco"
    (2017, or any in its layout: `root` is the folder with train2017/, val2017/ and annotations/).

    Raises:
        ValueError: an unknown data set, a number out of range, or annotations that are not COCO's.
        FileNotFoundError: there are no annotations.
    """

    real = "coco"
    stacked = False

    def _real_classes(self, root: str) -> tuple[str, ...]:
        self._sources[False] = CocoBoxes(root, "val2017", train=False)
        return self._sources[False].class_names

    def _read(self, root: str, train: bool) -> Dataset:
        source = CocoBoxes(root, "train2017", train=True)
        if source.class_names != self.class_names:
            raise ValueError(
                f"the training categories of {root!r} are others than those of val2017: "
                f"{sorted(set(source.class_names) ^ set(self.class_names))}"
            )
        return source

    def _transform(self, augment: bool) -> v2.Compose:
        random = [
            v2.RandomIoUCrop(),  # around objects, as SSD does
            v2.RandomHorizontalFlip(),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(labels_getter=_beside_boxes),  # those of which nothing remains
        ]
        place = random if augment else []
        return v2.Compose([*place, *_FLOAT, v2.ToPureTensor(), _image_and_boxes])


class _Samples(Dataset):
    """A split whose samples are a function of (seed, epoch, index)."""

    def __init__(self, source: Any, transform: Callable[[Any], Any], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> Any:
        """The sample of a `SampleKey`; a plain index means epoch 0."""
        epoch, index = key if isinstance(key, SampleKey) else SampleKey(0, key)
        sample = self.source[index]
        with isolated_rng(derive_seed(self.seed, epoch, index)):
            return self.transform(sample)


def _collate(stacked: bool, samples: list[Any]) -> tuple[Any, Any, list[Any]]:
    """Images, targets, and the replaced images that the loader asks for: there are none here."""
    images, targets = zip(*samples, strict=True)
    if stacked:
        return torch.stack(images), torch.stack(targets), []
    return list(images), list(targets), []


def _beside_boxes(picture: Picture) -> tuple[Any, Any]:
    """What goes with a box when it is left out."""
    return picture.labels, picture.iscrowd


def _image_and_mask(picture: Picture) -> tuple[Any, Any]:
    return picture.image, picture.mask


def _image_and_boxes(picture: Picture) -> tuple[Any, dict[str, Any]]:
    parts = picture._asdict()
    return picture.image, {key: parts[key] for key in ("boxes", "labels", "iscrowd")}


_FLOAT = (v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),)
