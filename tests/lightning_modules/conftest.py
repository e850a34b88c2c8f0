"""Folders of made-up images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_folder(tmp_path):
    """Writes random images: make_folder({"train": {"cat": 3}}) -> root."""

    def make(splits: dict[str, dict[str, int]], name: str = "images", size=(24, 20)) -> Path:
        root = tmp_path / name
        generator = np.random.default_rng(0)
        for split, classes in splits.items():
            for label, count in classes.items():
                folder = root / split / label
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return root

    return make


@pytest.fixture
def pets(make_folder):
    """Ten training images of two classes, four for validation."""
    return make_folder({"train": {"cat": 6, "dog": 4}, "val": {"cat": 2, "dog": 2}})
