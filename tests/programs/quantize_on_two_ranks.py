"""Train integers on two ranks: quantize_on_two_ranks.py WEIGHTS IMAGES FOLDER SCHEME."""

import copy
import sys

import torch
from lightning.pytorch import Callback

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.finetuning import first_training_images
from mobileone.quantization import calibrate_quantization
from tests.helpers.trainer import fit


class Start(Callback):
    """What this rank alone would have found, and what training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.calibrated = copy.deepcopy(pl_module.model.state_dict())
        alone = copy.deepcopy(pl_module.model)
        images = first_training_images(trainer.datamodule, torch.zeros(1))
        config = trainer.datamodule.data_config
        calibrate_quantization(alone, images, mean=config["mean"], std=config["std"])
        self.own = alone.state_dict()


if __name__ == "__main__":
    weights, root, out, scheme = sys.argv[1:]
    model = ImageClassifier(
        "mobileone_mu0", num_classes=2, weights=weights, quantize=scheme, lr=0.01
    )
    data = ImageDataModule(root, batch_size=4, input_size=32, seed=3, num_workers=0)
    start = Start()
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    trainer = fit(out, model, data, EMA(0.9), start, **options)
    state = {"own": start.own, "calibrated": start.calibrated, "weights": model.model.state_dict()}
    torch.save(state, f"{out}/{trainer.global_rank}.pt")
