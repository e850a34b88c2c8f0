"""The data modules of segmentation and detection: generated shapes, Pascal VOC, COCO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_modules.checks import check_model_name
from lightning_modules.dense.shapes import CLASSES, Shapes
from lightning_modules.dense.transforms import BoxTransform, MaskTransform

__all__ = ["DetectionData", "SegmentationData"]

_VOC_CLASSES = 21  # background and 20 kinds of objects
_COCO_CLASSES = 91  # COCO's own ids, which have gaps, and background


class _DenseData(LightningDataModule):
    """Loaders; subclasses say what a split is."""

    def __init__(self, batch_size: int, num_workers: int, collate: Callable[[Any], Any]) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size={batch_size} must be at least 1, num_workers={num_workers} at least 0."
            )
        self._batch_size, self._num_workers, self._collate = batch_size, num_workers, collate

    def split(self, train: bool) -> Dataset:
        """The training or the validation images with their targets."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, without an incomplete last one."""
        return self._loader(True)

    def val_dataloader(self) -> DataLoader:
        """Every validation image, in order."""
        return self._loader(False)

    def _loader(self, train: bool) -> DataLoader:
        images: Any = self.split(train)
        if train and len(images) < self._batch_size:
            raise ValueError(
                f"batch_size={self._batch_size} is larger than the {len(images)} training images: "
                "nothing would be trained. Lower --data.batch_size."
            )
        return DataLoader(
            images,
            self._batch_size,
            shuffle=train,
            drop_last=train,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            collate_fn=self._collate,
        )


class SegmentationData(_DenseData):
    """Images (N, 3, S, S), normalised, and masks (N, S, S) of class indices.

    Args:
        dataset: "shapes" (generated) or "voc" (Pascal VOC 2012, in torchvision's layout).
        root: folder above VOCdevkit.
        model: timm name, whose normalisation is used.
        size: side in pixels.
        count: generated training images; a quarter as many for validation.
        batch_size: images a batch and device.
        num_workers: processes a loader.
        download: fetch VOC.

    Raises:
        ValueError: an unknown data set, or a number out of range.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        root: str | None = None,
        model: str = "mobileone_s0",
        *,
        size: int = 512,
        count: int = 512,
        batch_size: int = 16,
        num_workers: int = 4,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, _stack)
        _check(dataset, ("shapes", "voc"), root, size, count)
        check_model_name(model)
        self._dataset, self._root, self._model = dataset, root, model
        self._size, self._count, self._download = size, count, download
        self.num_classes = len(CLASSES) if dataset == "shapes" else _VOC_CLASSES

    def prepare_data(self) -> None:
        """Fetch VOC, if that is wanted."""
        if self._dataset == "voc" and self._download:
            _voc(self._root, "train", download=True)

    def split(self, train: bool) -> Dataset:
        """Training images of VOC are cropped and mirrored at random, others resized."""
        source = (
            _shapes(self._count, self._size, train)
            if self._dataset == "shapes"
            else _voc(self._root, "train" if train else "val")
        )
        augment = train and self._dataset != "shapes"
        return _Mapped(source, MaskTransform(self._model, self._size, augment))


class DetectionData(_DenseData):
    """A list of images (3, H, W) in 0..1, and a list of targets with `boxes` and `labels`.

    Args:
        dataset: "shapes" (generated) or "coco" (2017).
        root: folder with train2017/, val2017/ and annotations/.
        size: side in pixels of generated images.
        count: generated training images; a quarter as many for validation.
        batch_size: images a batch and device.
        num_workers: processes a loader.

    Raises:
        ValueError: an unknown data set, or a number out of range.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        root: str | None = None,
        *,
        size: int = 320,
        count: int = 512,
        batch_size: int = 32,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, num_workers, _lists)
        _check(dataset, ("shapes", "coco"), root, size, count)
        self._dataset, self._root, self._size, self._count = dataset, root, size, count
        self.num_classes = len(CLASSES) if dataset == "shapes" else _COCO_CLASSES

    def split(self, train: bool) -> Dataset:
        """Training images of COCO are cropped around objects and mirrored at random."""
        if self._dataset == "shapes":
            return _Mapped(_shapes(self._count, self._size, train), BoxTransform(augment=False))
        return _Mapped(_coco(str(self._root), train), BoxTransform(augment=train))


class _Mapped(Dataset):
    """A data set with a function applied to every sample."""

    def __init__(self, source: Any, function: Callable[[Any], Any]) -> None:
        self.source, self.function = source, function

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.source[index])


def _check(dataset: str, known: tuple[str, ...], root: str | None, size: int, count: int) -> None:
    if dataset not in known:
        raise ValueError(f"dataset={dataset!r} is unknown. Use one of {', '.join(known)}.")
    if dataset != "shapes" and root is None:
        raise ValueError(f"dataset={dataset!r} needs --data.root, the folder where it lies.")
    if dataset == "shapes" and root is not None:
        others = ", ".join(name for name in known if name != "shapes")
        raise ValueError(f"--data.root is for dataset={others}; dataset='shapes' reads no files.")
    if size < 32 or size % 32 or count < 1:
        raise ValueError(f"size={size} must be a multiple of 32, and count={count} at least 1.")


def _shapes(count: int, size: int, train: bool) -> Shapes:
    return Shapes(count if train else max(1, count // 4), size, seed=int(train))


def _voc(root: str | None, image_set: str, download: bool = False) -> Any:
    from torchvision.datasets import VOCSegmentation

    folder = Path(str(root)).expanduser()
    try:
        return VOCSegmentation(str(folder), "2012", image_set, download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no Pascal VOC 2012 in {str(folder)!r}: VOCdevkit/VOC2012 must lie there. Set "
            "--data.root, or --data.download true."
        ) from error


def _coco(root: str, train: bool) -> Any:
    from torchvision.datasets import CocoDetection

    folder, name = Path(root).expanduser(), "train2017" if train else "val2017"
    annotations = folder / f"annotations/instances_{name}.json"
    if not annotations.is_file():
        raise FileNotFoundError(
            f"no COCO in {str(folder)!r}: {annotations} must lie there. Set --data.root."
        )
    images = CocoDetection(str(folder / name), str(annotations))
    if not train:
        return images
    # an image without objects gives the crops nothing to look for
    ids = enumerate(images.ids)
    return Subset(images, [i for i, key in ids if images.coco.getAnnIds(key, iscrowd=False)])


def _stack(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks)


def _lists(samples: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
