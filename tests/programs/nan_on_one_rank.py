"""Train on two ranks, one with images of NaN: nan_on_one_rank.py IMAGES FOLDER."""

import sys

import torch

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers.trainer import make_trainer


class OneRank(ImageClassifier):
    def training_step(self, batch, batch_idx):
        images, targets = batch
        if self.global_rank == 1 and self.current_epoch == 0 and batch_idx in (0, 1):
            images = images * torch.nan
        return super().training_step((images, targets), batch_idx)


class Validation(ImageClassifier):
    def validation_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 1:
            batch[0][1, 0, 3, 3] = torch.nan
        return super().validation_step(batch, batch_idx)


root, out = sys.argv[1:]
for name, kind in (("2", OneRank), ("0", OneRank), ("val", Validation)):
    torch.manual_seed(1)
    limit = 0 if name == "val" else int(name)
    model, ema = kind("test_byobnet", num_classes=2, lr=0.01, skip_nonfinite=limit), EMA(0.5)
    data = ImageDataModule(root, batch_size=2, input_size=32, num_workers=0, seed=0)
    trainer = make_trainer(out, ema, devices=2, strategy="ddp", max_epochs=2)
    try:
        trainer.fit(model, data)
        said, average = "", ema._average_model.module.state_dict()
    except FloatingPointError as error:
        said, average = str(error), {}
    state = {"weights": dict(model.named_parameters()), "average": average, "said": said}
    torch.save({**state, "step": trainer.global_step}, f"{out}/{name}-{trainer.global_rank}.pt")
