"""Gradients, weights and averages of a training: train_on_ranks.py NETWORK IMAGES FOLDER RANKS."""

import sys

import torch
import torch.distributed.nn.functional as collective
from lightning.pytorch import Callback
from torch.nn import functional as F

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.trainer import TimmSyncBatchNorm
from tests.helpers.trainer import fit


def synchronized(self, x):
    """The definition of SyncBatchNorm, of which torch has kernels for GPUs only."""
    if not self.training:
        stored = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *stored, False, 0.0, self.eps)
    count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
    total = collective.all_reduce(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]))
    mean = total[0] / count
    var = total[1] / count - mean.square()
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
    return x * self.weight.view(shape) + self.bias.view(shape)


class Gradients(Callback):
    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})


if __name__ == "__main__":
    name, root, out, devices = sys.argv[1:]
    devices = int(devices)
    torch.manual_seed(1)
    model = ImageClassifier(name, num_classes=2, lr=0.01)
    data = ImageDataModule(root, batch_size=8 // devices, input_size=32, seed=3, num_workers=0)
    options, gradients, ema = {"devices": devices}, Gradients(), EMA(0.9)
    if devices > 1:
        torch.nn.SyncBatchNorm.forward = synchronized
        # and DDP refuses the layer on CPUs
        torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *a: None
        options |= {"strategy": "ddp", "plugins": [TimmSyncBatchNorm()]}
    options |= {"precision": "64-true", "max_epochs": 2}
    trainer = fit(out, model, data, ema, gradients, **options)
    average = ema._average_model.module.state_dict()
    state = {"gradients": gradients.steps, "weights": model.state_dict(), "average": average}
    torch.save(state, f"{out}/{devices}-{trainer.global_rank}.pt")
