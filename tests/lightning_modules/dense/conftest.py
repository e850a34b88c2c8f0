"""Small data sets in the layouts of Pascal VOC and COCO, and a quiet command line."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.images import random_image

SIZES = [(50, 40), (64, 64), (40, 70), (90, 48), (64, 48), (48, 64)]  # width, height
GRAY = 2  # the image without colors


@pytest.fixture(autouse=True)
def _here(here):
    """A folder of its own for each test."""


def photo(number):
    image = random_image(number, SIZES[number])
    return image.convert("L") if number == GRAY else image


@pytest.fixture
def voc(tmp_path):
    """Six images, four of them for training: the upper half is one class, then a border of 255."""
    root = tmp_path / "voc/VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_0\n2007_1\n2007_2\n2007_3\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_4\n2007_5\n")
    for number, (width, height) in enumerate(SIZES):
        photo(number).save(root / f"JPEGImages/2007_{number}.jpg")
        classes = np.zeros((height, width), np.uint8)
        classes[: height // 2] = 1 + number
        classes[height // 2] = 255
        mask = Image.fromarray(classes).convert("P")
        mask.putdata(classes.reshape(-1).tolist())
        mask.save(root / f"SegmentationClass/2007_{number}.png")
    return tmp_path / "voc"


# (image, category, box as x, y, width, height, crowd); ids have gaps and are in no order
NOTES = [
    (0, 17, [10, 5, 30, 20], 0),
    (0, 3, [2.5, 8, 20, 30], 0),
    (0, 44, [0, 0, 50, 40], 1),
    (1, 44, [16, 16, 32, 40], 0),
    (2, 3, [4, 30, 30, 36], 0),
    (3, 17, [5, 5, 80, 40], 1),  # nothing but a crowd
    (5, 3, [1, 1, 30, 30], 0),
]  # image 4 has nothing at all


def _write_coco(root, categories):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir(exist_ok=True)
        for number in range(len(SIZES)):
            photo(number).save(root / split / f"{number:03d}.jpg")
        text = {
            "images": [
                {"id": 100 + n, "file_name": f"{n:03d}.jpg", "width": w, "height": h}
                for n, (w, h) in enumerate(SIZES)
            ],
            "annotations": [
                {"id": 7 * k + 1, "image_id": 100 + n, "category_id": c, "bbox": box}
                | {"iscrowd": crowd, "area": box[2] * box[3]}
                for k, (n, c, box, crowd) in enumerate(NOTES)
            ],
            "categories": [{"id": key, "name": name} for key, name in categories],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(text))
    return root


@pytest.fixture
def make_coco(tmp_path):
    """make_coco(folder, third category) -> root; six images, see `NOTES`."""

    def make(name, third):
        return _write_coco(tmp_path / name, ((44, "cat"), (3, "dog"), (17, third)))

    return make


@pytest.fixture
def coco(make_coco):
    return make_coco("coco", "bird")
