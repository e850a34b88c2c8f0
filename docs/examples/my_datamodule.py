"""A data module; `mobileone fit --data my_datamodule.Noise`."""

import torch
from lightning.pytorch import LightningDataModule
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, TensorDataset


class Noise(LightningDataModule):
    class_names = ("cat", "dog")  # one output of the network each
    data_config = resolve_data_config({"input_size": (3, 32, 32)})  # with mean, std, crop_pct, ...

    def train_dataloader(self):  # float images (N, C, H, W), normalized, and class indices (N,)
        return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2), 4)

    val_dataloader = test_dataloader = train_dataloader
