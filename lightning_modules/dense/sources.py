"""Pascal VOC's masks and COCO's boxes, by torchvision's readers, checked before they are used."""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VOCSegmentation

from lightning_modules.dense.shapes import Picture, corner_boxes

__all__ = ["IGNORED", "VOC_CLASSES", "CocoBoxes", "VocMasks"]

IGNORED = 255
"""Label of pixels that count neither for the loss nor for the score, as in VOC's masks."""

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
"""Names of the classes, in the order of the masks' values."""


class VocMasks(Dataset[Picture]):
    """Images of Pascal VOC 2012 with their segmentation.

    Args:
        root: Folder above VOCdevkit.
        image_set: `train` or `val`.
        download: Fetch the archive, which is large, if it is not there.

    Raises:
        FileNotFoundError: The data set, its list of images, or one of its files is missing.
    """

    def __init__(self, root: str | Path, image_set: str, download: bool = False) -> None:
        folder = Path(root).expanduser()
        listed = folder / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{image_set}.txt"
        if not download and not listed.is_file():
            raise FileNotFoundError(
                f"no Pascal VOC 2012 in {str(folder)!r}: {listed} must exist. Set --data.root, "
                "or --data.download true."
            )
        self._source = VOCSegmentation(str(folder), "2012", image_set, download)
        _check_files(self._source.images, listed)
        _check_files(self._source.masks, listed)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Picture:
        """Read an image and its mask.

        Raises:
            ValueError: The mask is not one of VOC's.
        """
        image, mask = self._source[index]
        values = torch.from_numpy(np.array(mask))  # read, so that its file is closed
        name = self._source.masks[index]
        if mask.mode not in ("P", "L") or mask.size != image.size:
            raise ValueError(
                f"{name} is {mask.mode} of {mask.size}: a mask is a palette or gray image of the "
                f"size of its image, {image.size}"
            )
        classes = values.long()
        largest = int(classes.where(classes != IGNORED, 0).max())
        if largest >= len(VOC_CLASSES):
            raise ValueError(
                f"{name} has the class {largest}: VOC's are 0 to {len(VOC_CLASSES) - 1}, "
                f"and {IGNORED}"
            )
        return Picture(tv_tensors.Image(image), mask=tv_tensors.Mask(classes))


class CocoBoxes(Dataset[Picture]):
    """Images of a data set in COCO's layout with their boxes; labels count from 1.

    Args:
        root: Folder with `<name>/` and `annotations/instances_<name>.json`.
        name: Of the split, for example `val2017`.
        train: Leave out crowds, and images without other objects.

    Attributes:
        class_names: `background` and COCO's categories, in the order of their ids, which may have
            gaps.

    Raises:
        FileNotFoundError: The annotations or some of their images are missing.
        ValueError: The annotations are not COCO's.
    """

    def __init__(self, root: str | Path, name: str, train: bool) -> None:
        file = _annotations(root, name)
        folder = Path(root).expanduser() / name
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                self._source = CocoDetection(str(folder), str(file))
            categories = self._source.coco.cats
            names = (str(categories[key]["name"]) for key in sorted(categories))
            self.class_names = ("background", *names)
            notes = self._source.coco.anns.values()
            sizes = {len(note["bbox"]) for note in notes}
            unknown = {note["category_id"] for note in notes} - set(categories)
            files = [folder / image["file_name"] for image in self._source.coco.imgs.values()]
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(_not_coco(file, error)) from error
        if sizes - {4}:
            raise ValueError(_not_coco(file, "a `bbox` has other than four numbers"))
        if unknown:
            raise ValueError(_not_coco(file, f"no category for `category_id` {sorted(unknown)}"))
        _check_files(files, file)
        self._labels = {key: number for number, key in enumerate(sorted(categories), 1)}
        self._train = train
        every = range(len(self._source))
        coco, ids = self._source.coco, self._source.ids
        # an image without objects gives the random crops nothing to look for
        self._kept = [i for i in every if not train or coco.getAnnIds(ids[i], iscrowd=False)]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Picture:
        """Read an image and its boxes."""
        image, notes = self._source[self._kept[index]]
        kept = [note for note in notes if not (self._train and note.get("iscrowd"))]
        boxes = torch.tensor([note["bbox"] for note in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, width, height -> x1, y1, x2, y2
        return Picture(
            tv_tensors.Image(image),
            boxes=corner_boxes(boxes, image.height, image.width),
            labels=torch.tensor([self._labels[n["category_id"]] for n in kept], dtype=torch.int64),
            iscrowd=torch.tensor([int(n.get("iscrowd", 0)) for n in kept], dtype=torch.int64),
        )


def _annotations(root: str | Path, name: str) -> Path:
    folder = Path(root).expanduser()
    file = folder / f"annotations/instances_{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"no COCO in {str(folder)!r}: {file} must exist. Set --data.root.")
    return file


def _not_coco(file: Path, reason: object) -> str:
    return (
        f"{file} is not in COCO's format ({reason!r}): it needs `images` (id, file_name), "
        "`annotations` (image_id, category_id, bbox) and `categories` (id, name)"
    )


def _check_files(files: Iterable[str | Path], listed: Path) -> None:
    """Look into each folder once: a data set has a hundred thousand files."""
    paths = [Path(file) for file in files]
    present = {
        folder: {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        for folder in {path.parent for path in paths}
    }
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing, and {len(missing) - 1} more of the {len(paths)} files that "
            f"{listed} lists"
        )
