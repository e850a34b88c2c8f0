"""The data module: any image data set that timm reads, with timm's transforms for the model."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_modules.data.base import ResumableData
from lightning_modules.data.dataset import ImageClassificationDataset, IterableImageDataset
from lightning_modules.data.digits import cache_root, digits_root, write_digits
from lightning_modules.data.image_io import color_mode
from lightning_modules.data.samplers import EpochSampler, ShardSampler
from lightning_modules.data.shards.reader import shard_lengths
from lightning_modules.data.splits import FOLDER_NAMES, DatasetSplits, check_dataset_name
from lightning_modules.data.transforms import (
    PhasedTransform,
    check_augmentation_kwargs,
    eval_transform,
    resolve_config,
    scale_strength,
    train_transform,
)
from mobileone.io.atomic import directory_lock

__all__ = ["ImageDataModule"]


class ImageDataModule(ResumableData):
    """Images of classes, from folders (``root/train/<class>/*``, ``root/val/<class>/*``) or timm.

    Every training batch is a function of (seed, epoch, position): the same for any number of
    workers, and the same in a run that was resumed, within an epoch too. (Streams: for a fixed
    number of workers, and resumed from the end of an epoch.)

    Args:
        root: folder above the splits (or of train.tar and val.tar); for other data sets what
            their reader wants.
        dataset: "" for folders, "digits" for the handwritten digits that come with scikit-learn,
            "wds" for the shards that `mobileone shards` writes, "my_data:make_split" for a function
            of your own (see `dataset.find_function`), or a name of `timm.data.create_dataset`:
            "torch/cifar10", "hfds/…", "wds/…" (others' shards), ….
        model: timm name; its pretrained configuration gives the values left None below.
        train_split: name of the training split; for folders also a usual synonym of it.
        val_split: name of the validation split; for folders also a usual synonym of it.
        test_split: None for the folder test/ if there is one, else the validation split.
        classes: text file, one class a line, that fixes names and indices. By default the
            sorted folder names, or the names that the data set has.
        download: let torchvision or Hugging Face fetch the data.
        input_size: side in pixels, or (channels, height, width).
        in_chans: 1 reads the images as gray, 3 as RGB, 4 as RGBA; None for what `input_size` or
            the model has. The network gets as many.
        mean: of the normalization, one value or one a channel.
        std: of the normalization, one value or one a channel.
        interpolation: of resizing in the evaluation and in the training crop.
        crop_pct: share of the resized short side that the evaluation keeps, in (0, 1].
        crop_mode: of the evaluation: "center", "border" or "squash".
        auto_augment: timm's policy, for example "original-mstd0.5" or "rand-m9-mstd0.5". The
            paper uses AutoAugment for S2-S4 only (section 4).
        color_jitter: strength; None, as in the paper, for none.
        hflip: probability of mirroring; 0 for digits and other things with a handedness.
        vflip: probability of turning upside down.
        scale: range of the random crop's share of the image's area.
        ratio: range of the random crop's aspect ratio, width by height.
        re_prob: probability of random erasing.
        augmentation_kwargs: further arguments of `timm.data.create_transform` for the training,
            for example ``{"re_mode": "pixel", "grayscale_prob": 0.1, "gaussian_blur_prob": 0.1}``.
        batch_size: per device.
        num_workers: processes a loader; None for what the machine suggests, 8 at most.
        persistent_workers: keep them from one epoch to the next.
        drop_last: leave out the last incomplete training batch.
        skip_unreadable: replace broken images by others with a warning a pass, don't stop.
        seed: of order and augmentation; None for the one of the checkpoint that is
            resumed, else the run's (`seed_everything`), else 0.

    Attributes:
        data_config: timm's keys input_size, interpolation, mean, std, crop_pct, crop_mode.

    Raises:
        ValueError: an argument out of its range, an unknown model, data set or policy.
    """

    def __init__(
        self,
        root: str | None = None,
        dataset: str = "",
        model: str = "mobileone_s0",
        *,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        classes: str | None = None,
        download: bool = False,
        input_size: int | tuple[int, int, int] | None = None,
        in_chans: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        auto_augment: str | None = None,
        color_jitter: float | None = None,
        hflip: float = 0.5,
        vflip: float = 0.0,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        re_prob: float = 0.0,
        augmentation_kwargs: dict[str, Any] | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        persistent_workers: bool = True,
        drop_last: bool = True,
        skip_unreadable: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, persistent_workers, seed)
        if dataset != "digits":
            check_dataset_name(dataset)
        if root is None and dataset in FOLDER_NAMES:
            raise ValueError(
                "root is not set. Set --data.root to the folder that holds train/ and val/, or "
                "--data.dataset to digits to try the handwritten digits."
            )
        self.data_config: dict[str, Any] = resolve_config(
            model,
            input_size,
            in_chans,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
        self._augmentation: dict[str, Any] = {
            "auto_augment": auto_augment,
            "color_jitter": color_jitter,
            "hflip": hflip,
            "vflip": vflip,
            "scale": scale,
            "ratio": ratio,
            "re_prob": re_prob,
        }
        check_augmentation_kwargs(augmentation_kwargs or {}, self._augmentation)
        self._augmentation.update(augmentation_kwargs or {})
        size = self.data_config["input_size"][1]
        self.set_curriculum([(0, size, 1.0)])
        self._eval_transform = PhasedTransform([(0, eval_transform(self.data_config))])
        self._mode = color_mode(self.data_config["input_size"][0])
        self._digits = digits_root(root) if dataset == "digits" else None
        self._root = self._digits or (Path(root).expanduser() if root else None)
        self._splits = DatasetSplits(
            "" if self._digits else dataset,
            self._root,
            train_split,
            val_split,
            test_split,
            classes,
            batch_size=batch_size,
            input_img_mode=self._mode,
        )
        self._download = download
        self._drop_last = drop_last
        self._skip_unreadable = skip_unreadable

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of their indices.

        Available before `setup` too: then the data set is prepared and listed at first use.
        """
        self.prepare_data()
        index = self._splits.class_index
        return sorted(index, key=index.__getitem__)

    @property
    def tests_validation(self) -> bool:
        """Whether a test sees the validation images, because the data have no others."""
        return self._splits.tests_validation

    def set_curriculum(self, phases: Sequence[tuple[int, int, float]]) -> None:
        """Let image size and augmentation strength of the training change with the epoch.

        Validation stays at the full size. Call it before the training loader is made.

        Args:
            phases: First epoch, side in pixels and strength (0..1) of each phase; see
                `callbacks.curriculum.Curriculum`. The side of images that are not square is the
                height; the width keeps the ratio of `input_size`.

        Raises:
            ValueError: an augmentation that timm does not know.
        """
        channels, height, width = self.data_config["input_size"]
        transforms = []
        for start, size, strength in phases:
            shape = (channels, size, round(size * width / height))
            full = train_transform({**self.data_config, "input_size": shape}, **self._augmentation)
            transforms.append((start, scale_strength(full, strength)))
        self._train_transform = PhasedTransform(transforms)

    def prepare_data(self) -> None:
        """Write the digits, or let torchvision or Hugging Face download.

        Any number of processes may call it at the same time.
        """
        if self._digits:
            write_digits(self._digits)
        elif self._download:
            # every process asks for the classes before there is a Trainer to order them: the first
            # one on this machine downloads, and the others wait here and find what it has left
            with directory_lock(self._root or cache_root(), patience=math.inf):
                self._splits.download()

    def setup(self, stage: str) -> None:
        """List the files and check the classes of the splits that ``stage`` needs.

        Raises:
            FileNotFoundError: no root or no such split; the message lists what is there.
            ValueError: no images, an empty class, splits with different classes, or so few images
                that nothing would be trained or a process would have none to evaluate.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        sources = {split: self._splits.source(split) for split in needed.get(stage, ())}
        for split, source in sources.items():
            if not isinstance(source, IterableDataset):
                self._check_count(len(source), split, self._drop_last)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches, images float (N, C, H, W) and targets long (N,)."""
        source = self._splits.source("train")
        if isinstance(source, IterableDataset):  # shuffles and shares out by itself
            return self._loader_of(source, self._train_transform, drop_last=self._drop_last)
        share = (self.seed, self._processes, self._rank)
        lengths = shard_lengths(source)
        sampler = ShardSampler(source, lengths, *share) if lengths else EpochSampler(source, *share)
        options = {"sampler": sampler, "drop_last": self._drop_last, "resumable": True}
        return self._loader_of(source, self._train_transform, **options)

    def val_dataloader(self) -> DataLoader:
        """The validation images, each once and in order, with the evaluation transform."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """The test images (validation images if there are none), each once and in order."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader:
        source = self._splits.source(split)
        stream = isinstance(source, IterableDataset)
        sampler = None if stream else self._evaluation_sampler(source)
        return self._loader_of(source, self._eval_transform, sampler=sampler)

    def _loader_of(self, source: Any, transform: PhasedTransform, **options: Any) -> DataLoader:
        classes = len(self._splits.class_index)
        if isinstance(source, IterableDataset):
            stream = IterableImageDataset(source, transform, self.seed, self._workers(), classes)
            loader = self._loader(stream, **options)
            loader.sampler.set_epoch = stream.set_epoch  # type: ignore[attr-defined]  # Lightning calls it
            return loader
        images = ImageClassificationDataset(
            source, transform, self._mode, self.seed, self._skip_unreadable, classes
        )
        return self._loader(images, **options)
