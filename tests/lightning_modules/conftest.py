"""Folders of made-up images, a short training, and scripts on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from tests.helpers.paths import REPOSITORY


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


@pytest.fixture
def train(pets, tmp_path):
    """Fits a module on the pets, with averaged weights: train(module, batch_size=5) -> trainer."""

    def run(module, batch_size: int, epochs: int, **options) -> Trainer:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[EMA(0.5)],
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        data = ImageDataModule(
            str(pets), batch_size=batch_size, input_size=32, num_workers=0, seed=0
        )
        trainer.fit(module, data)
        return trainer

    return run


@pytest.fixture(scope="session")
def two_processes():
    """Runs a script as both ranks of a torchrun: two_processes(source, folder, *arguments)."""

    def run(source: str, folder: Path, *arguments: object) -> None:
        script = folder / "two_processes.py"
        # rarely (three of some eighty) a forked loader worker never leaves fork; stacks are told
        traced = "import faulthandler; faulthandler.dump_traceback_later(150)\n"
        script.write_text(traced + source)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", "2", str(script), *map(str, arguments)]
        path = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        for attempt in (1, 2):
            try:
                done = subprocess.run(
                    command, env={**os.environ, **path}, capture_output=True, text=True, timeout=200
                )
                break
            except subprocess.TimeoutExpired as error:
                where = (error.stderr or b"")[-10_000:].decode(errors="replace")
                print(f"attempt {attempt} hangs:\n{where}", file=sys.stderr)
                if attempt == 2:
                    raise
        assert done.returncode == 0, done.stderr[-3000:]

    return run
