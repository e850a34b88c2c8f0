"""Train on shards on two ranks, and resume within an epoch: shards_on_two_ranks.py FOLDER.

An image's number is its color, so it can be read from what the network gets.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers.trainer import fit

out = sys.argv[1]


class Records(ImageClassifier):
    def training_step(self, batch, batch_idx):
        self.trained.append([self.current_epoch, batch_idx, numbers(batch)])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated += numbers(batch)
        return super().validation_step(batch, batch_idx)


def numbers(batch):
    return (batch[0][:, 0].amax((1, 2)) * 255).round().int().tolist()


def run(name, shards, ckpt_path=None):
    images = {"input_size": 32, "mean": (0.0,), "std": (1.0,), "batch_size": 5, "drop_last": False}
    data = ImageDataModule(f"{out}/{shards}", "wds", num_workers=2, seed=3, **images)
    torch.manual_seed(1)
    module = Records("test_byobnet", num_classes=2, lr=0.01)
    module.trained, module.validated = [], []
    saving = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1}
    callbacks = EMA(0.9), ModelCheckpoint(f"{out}/{name}", **saving)
    ranks = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    trainer = fit(out, module, data, *callbacks, ckpt_path=ckpt_path, **ranks)
    trainer.save_checkpoint(f"{out}/{name}.ckpt")
    module.validated = []
    (metrics,) = trainer.validate(module, data, ckpt_path=f"{out}/{name}.ckpt", verbose=False)
    seen = {"trained": module.trained, "validated": module.validated, "metrics": metrics}
    Path(out, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    run("even", "shards-24")
    run("odd", "shards-23")
    run("rest", "shards-24", f"{out}/even/step=1.ckpt")
    run("later", "shards-24", f"{out}/even/step=5.ckpt")
