"""Small LightningModules, networks and data for trainings of a second."""

import hashlib

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mobileone import MobileOneBlock
from mobileone.export import ExportSpec

__all__ = ["Recorder", "ScoredClassifier", "digest"]


def digest(batch):
    """A digest of images and targets."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()


class Recorder(LightningModule):
    """One weight, trained by SGD on the mean of the images; records the batches that it gets.

    Args:
        look: look(module, batch) -> what to keep of a batch in `trained` and `validated`.
    """

    def __init__(self, look=lambda module, batch: None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.look, self.trained, self.validated = look, [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(self.look(self, batch))
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.look(self, batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ScoredClassifier(LightningModule):
    """A tiny network on random images; its scores are a list, so that a test decides the best.

    Args:
        scores: `val/acc1` of each validation, then 0.
        steps: Training batches of an epoch.
    """

    def __init__(self, scores=(), steps=4):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Sequential(
            MobileOneBlock(3, 8, stride=2, num_conv_branches=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
        self.scores, self.steps = list(scores), steps

    @property
    def export_spec(self):
        return ExportSpec(
            "tiny", ("a", "b", "c"), (3, 16, 16), (0.5,) * 3, (0.2,) * 3, "bilinear", 1
        )

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch):
        self.model(batch[0])

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val/acc1", self.scores.pop(0) if self.scores else 0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return self._loader(self.steps)

    def val_dataloader(self):
        return self._loader(1)

    @staticmethod
    def _loader(batches):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4 * batches, 3, 16, 16, generator=generator)
        y = torch.randint(0, 3, (4 * batches,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=4)
