"""Collapsed training in two processes: gradients are averaged as those of the branches are."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, path_of


def network():
    """One block of every form: stem, depthwise, pointwise with several branches and with one."""
    torch.manual_seed(0)
    return nn.Sequential(
        MobileOneBlock(3, 8, stride=2),
        MobileOneBlock(8, 8, groups=8),
        MobileOneBlock(8, 8, 1, num_conv_branches=4),
        MobileOneBlock(8, 12, 1),
    ).double()


def images(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, 3, 12, 10, dtype=torch.float64, generator=generator)


def train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = network()
    set_collapse(model, "always")
    assert path_of(model[0], images(rank)) is Path.GRAM
    parallel = DistributedDataParallel(model)
    parallel(images(rank)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save({**gradients, **dict(model.named_buffers())}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_the_branches(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    models = [network() for _ in range(2)]
    for rank, model in enumerate(models):
        set_collapse(model, "never")
        model(images(rank)).square().sum().backward()
    for rank, model in enumerate(models):
        saved = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in model.named_parameters():
            mean = (models[0].get_parameter(name).grad + models[1].get_parameter(name).grad) / 2
            torch.testing.assert_close(saved[name], mean, rtol=1e-9, atol=1e-9)
            assert parameter.grad is not None
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(saved[name], buffer, rtol=1e-9, atol=1e-9)
