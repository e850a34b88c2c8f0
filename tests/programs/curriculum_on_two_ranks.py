"""Sizes and magnitudes of a curriculum on two ranks: curriculum_on_two_ranks.py IMAGES FOLDER.

The operation is replaced by one that paints an image in the angle by which it would be turned:
what is recorded is the magnitude that the workers' transform really used.
"""

import json
import sys
from pathlib import Path

import timm.data.auto_augment as augment
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from callbacks.curriculum import Curriculum
from lightning_modules.data.datamodule import ImageDataModule
from tests.helpers.modules import Recorder
from tests.helpers.trainer import fit

root, out = sys.argv[1:]


def paint(image, degrees, **options):
    return Image.new("RGB", image.size, (round(9 * abs(degrees)),) * 3)


augment._RAND_TRANSFORMS[:] = ["Rotate"]
augment.NAME_TO_OP["Rotate"] = paint


def look(module, batch):
    size = batch[0].shape[-2]
    if not module.training:
        return size
    degrees = batch[0] * 255 / 9
    assert degrees.min() == degrees.max(), "all images of a batch have one magnitude"
    magnitude = float(degrees.max()) / 3  # timm turns by 30 degrees at magnitude 10
    return module.global_step, size, round(magnitude, 1)


def train(name, workers, ckpt_path=None):
    images = {"input_size": 32, "mean": (0.0,), "std": (1.0,), "hflip": 0.0, "batch_size": 4}
    workers = {"num_workers": workers, "persistent_workers": workers > 0}
    data = ImageDataModule(root, seed=3, auto_augment="rand-m9-n1-p1.0", **images, **workers)
    curriculum = Curriculum([(0, 16, 0.3), (100, 24, 0.7), (200, 32, 1.0)])
    saving = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1}
    callbacks = curriculum, ModelCheckpoint(f"{out}/{name}", **saving)
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 6, "num_sanity_val_steps": 2}
    module = Recorder(look)
    trainer = fit(out, module, data, *callbacks, ckpt_path=ckpt_path, **options)
    assert trainer.world_size == 2 and set(module.validated) == {32}
    Path(out, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(module.trained))


if __name__ == "__main__":
    train("alone", 0)
    train("persistent", 2)
    for step in (6, 7, 10):
        train(f"from-{step}", 1, f"{out}/persistent/step={step}.ckpt")
