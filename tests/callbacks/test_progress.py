"""The line an epoch."""

import re

import torch
from torch.utils.data import DataLoader, TensorDataset

from callbacks.progress import EpochLines
from tests.helpers.modules import Recorder
from tests.helpers.trainer import fit


class Logs(Recorder):
    def training_step(self, batch, batch_idx):
        self.log("train/loss_epoch", batch[0].mean(), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/acc1", float(self.current_epoch))


def test_every_epoch_has_a_line_and_only_fresh_validation_metrics(tmp_path, capsys):
    data = DataLoader(TensorDataset(torch.full((4, 1), 2.0)), batch_size=2)
    options = {"max_epochs": 3, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 1}
    fit(tmp_path, Logs(), (data, data), EpochLines(), **options)
    said = capsys.readouterr().out.splitlines()
    lines = [re.sub(r"  \d+ s$", "", line) for line in said if line.startswith("epoch")]
    assert lines == [
        "epoch 0/2  step 2  train/loss_epoch 2.0000",
        "epoch 1/2  step 4  train/loss_epoch 2.0000  val/acc1 1.0000",
        "epoch 2/2  step 6  train/loss_epoch 2.0000",
    ]
