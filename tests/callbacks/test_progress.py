"""The line an epoch."""

import re

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.progress import EpochLines


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, _):
        loss = (self.weight * batch[0]).mean()
        self.log("train/loss_epoch", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, _):
        self.log("val/acc1", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_every_epoch_has_a_line_and_only_fresh_validation_metrics(tmp_path, capsys):
    data = DataLoader(TensorDataset(torch.full((4, 1), 2.0)), batch_size=2)
    Trainer(
        max_epochs=3,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=1,
        accelerator="cpu",
        callbacks=[EpochLines()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Net(), data, data)
    said = capsys.readouterr().out.splitlines()
    lines = [re.sub(r"  \d+ s$", "", line) for line in said if line.startswith("epoch")]
    assert lines == [
        "epoch 1/3  step 2  train/loss_epoch 2",
        "epoch 2/3  step 4  train/loss_epoch 2  val/acc1 1",
        "epoch 3/3  step 6  train/loss_epoch 2",
    ]
