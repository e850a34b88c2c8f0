"""Two processes train as one does on the joint batch."""

import os
import subprocess
import sys

import pytest
import timm
import torch

from lightning_modules.run.trainer import TimmSyncBatchNorm
from tests.helpers.paths import REPOSITORY

SCRIPT = """
import sys, torch
import torch.distributed.nn.functional as collective
from torch.nn import functional as F
from lightning.pytorch import Callback, Trainer
from callbacks.ema import EMA
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.run.trainer import TimmSyncBatchNorm


def synchronized(self, x):
    # torch has kernels of SyncBatchNorm for GPUs only; this is its definition
    if not self.training:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            False, 0.0, self.eps)
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
    options, gradients, ema = {}, Gradients(), EMA(0.9)
    if devices > 1:
        torch.nn.SyncBatchNorm.forward = synchronized
        # and DDP refuses the layer on CPUs
        torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *a: None
        options = {"strategy": "ddp", "plugins": [TimmSyncBatchNorm()]}
    trainer = Trainer(accelerator="cpu", devices=devices, precision="64-true", max_epochs=2,
                      callbacks=[ema, gradients], logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False,
                      num_sanity_val_steps=0, default_root_dir=out, **options)
    trainer.fit(model, data)
    state = {"gradients": gradients.steps, "weights": model.state_dict(),
             "average": ema._average_model.module.state_dict()}
    torch.save(state, f"{out}/{devices}-{trainer.global_rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_mu0", "test_byobnet"])
def test_gradients_and_averages_are_those_of_the_joint_batch(name, make_folder, tmp_path):
    root = make_folder({"train": {"a": 12, "b": 12}, "val": {"a": 3, "b": 2}})
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    for devices in ("1", "2"):
        command = [sys.executable, tmp_path / "train.py", name, root, tmp_path, devices]
        subprocess.run(command, check=True, timeout=300, env=environment)
    alone, first, second = (
        torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("1-0", "2-0", "2-1")
    )
    assert len(alone["gradients"]) == len(first["gradients"]) == 6
    scale = max(g.abs().max() for g in alone["gradients"][0].values())
    for step, expected in enumerate(alone["gradients"][:2]):
        for key, gradient in expected.items():
            error = (first["gradients"][step][key] - gradient).abs().max() / scale
            assert error < 1e-9, (step, key)
    for part in ("gradients", "weights", "average"):  # the same bits on both ranks
        pairs = zip(_flat(first[part]), _flat(second[part]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part
    for key, value in alone["average"].items():  # kept in float32
        torch.testing.assert_close(first["average"][key], value, rtol=1e-4, atol=1e-6)


def _flat(part):
    return [v for step in (part if isinstance(part, list) else [part]) for v in step.values()]


def test_the_conversion_keeps_the_activation_inside_a_norm():
    model = timm.create_model("test_byobnet")
    before = [
        type(m.act) for m in model.modules() if hasattr(m, "running_mean") and hasattr(m, "act")
    ]
    assert any(act is not torch.nn.Identity for act in before)
    converted = TimmSyncBatchNorm().apply(model)
    norms = [m for m in converted.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert [type(m.act) for m in norms] == before
