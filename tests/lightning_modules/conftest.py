"""Folders of made-up images, and a short training."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from tests.helpers.images import write_images
from tests.helpers.trainer import fit


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test's own folder is the current one; no wandb run is left open."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    import wandb

    wandb.finish()


@pytest.fixture
def make_folder(tmp_path):
    """Writes random images: make_folder({"train": {"cat": 3}}) -> root."""

    def make(splits: dict[str, dict[str, int]], name: str = "images", size=(24, 20)) -> Path:
        return write_images(tmp_path / name, splits, size)

    return make


@pytest.fixture
def pets(make_folder):
    """Ten training images of two classes, four for validation."""
    return make_folder({"train": {"cat": 6, "dog": 4}, "val": {"cat": 2, "dog": 2}})


@pytest.fixture
def train(pets, tmp_path):
    """Fits a module on the pets, with averaged weights: train(module, batch_size=5) -> trainer."""

    def run(module, batch_size: int, epochs: int, **options) -> Trainer:
        data = ImageDataModule(
            str(pets), batch_size=batch_size, input_size=32, num_workers=0, seed=0
        )
        options = {"max_epochs": epochs, "num_sanity_val_steps": 2, **options}
        return fit(tmp_path, module, data, EMA(0.5), **options)

    return run
