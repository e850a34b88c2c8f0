"""Classes as a user writes them: a classifier with another argument, free modules, data."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.recipe.classifier import ImageClassifier
from mobileone.export import ExportSpec

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


class MyClassifier(ImageClassifier):
    """The template's, with an argument of its own."""

    def __init__(self, *args, extra: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra


class Free(LightningModule):
    """Nothing of the template's but what the artifact needs."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), flat)
        self.model.append(nn.Linear(width, 2))
        self.export_spec = ExportSpec("free", ("ant", "bee"), **CONFIG)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc1", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MyData(LightningDataModule):
    """Random images of two classes."""

    def __init__(self, count: int = 8, channels: int = 3):
        super().__init__()
        self.class_names = ["ant", "bee"]
        mean, std = ((value,) * channels for value in (0.5, 0.25))
        self.data_config = {**CONFIG, "input_size": (channels, 32, 32), "mean": mean, "std": std}
        images = torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(0))
        self.pairs = TensorDataset(images, torch.arange(count) % 2)

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


class Untrained(MyData):
    """Lacks training images."""

    train_dataloader = LightningDataModule.train_dataloader


class Unvalidated(MyData):
    """Lacks validation images."""

    val_dataloader = LightningDataModule.val_dataloader


class Nameless(MyData):
    """Lacks the names of the classes."""

    def __init__(self):
        super().__init__()
        del self.class_names


class OwnDefaults(MyClassifier):
    """Arguments as the template's, with other defaults."""

    def __init__(self, *, num_classes: int, lr: float = 0.03, model: str = "test_byobnet"):
        super().__init__(model, num_classes=num_classes, lr=lr)


class Sized(MyData):
    """An argument as the template's, with another default."""

    def __init__(self, batch_size: int = 2, count: int = 8):
        super().__init__(count)
        self.batch_size = batch_size
