"""A network small enough to convert in a second, with BatchNorm statistics that matter."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mobileone import MobileOneBlock
from mobileone.export import ExportSpec


def randomize_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def tiny(channels: int = 3, classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        MobileOneBlock(channels, 8, stride=2, num_conv_branches=2),
        MobileOneBlock(8, 8, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    return randomize_norms(model).eval()


def spec_for(
    channels: int = 3, size: tuple[int, int] = (32, 48), names: tuple[str, ...] = ("a", "b", "c")
) -> ExportSpec:
    mean, std = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.125, 0.25)
    return ExportSpec(
        "tiny", names, (channels, *size), mean[:channels], std[:channels], "bilinear", 0.9
    )


@pytest.fixture(scope="session")
def make_model():
    return tiny


@pytest.fixture(scope="session")
def make_spec():
    return spec_for


@pytest.fixture(scope="session")
def randomize():
    return randomize_norms


@pytest.fixture
def exported(tmp_path: Path):
    """Export the tiny model as TorchScript; returns model, folder and manifest."""
    from mobileone.export import export_model

    model = tiny()
    folder = tmp_path / "artifact"
    return model, folder, export_model(model, spec_for(), folder, ["torchscript"])
