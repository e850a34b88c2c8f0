"""Folders of random images."""

import numpy as np
from PIL import Image

__all__ = ["random_image", "write_images"]


def random_image(seed, size=(24, 20)):
    """An RGB image of random pixels; `size` is (width, height)."""
    return _image(np.random.default_rng(seed), size)


def write_images(root, splits, size=(24, 20)):
    """Write {"train": {"cat": 3}} as three files train/cat/<number>.png; returns the root."""
    generator = np.random.default_rng(0)
    for split, classes in splits.items():
        for label, count in classes.items():
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                _image(generator, size).save(folder / f"{number}.png")
    return root


def _image(generator, size):
    width, height = size
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
