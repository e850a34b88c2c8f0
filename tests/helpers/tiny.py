"""A network small enough to convert in a second, and the specification of its input."""

import torch
from torch import nn

from mobileone import MobileOneBlock
from mobileone.export import ExportSpec
from tests.helpers.norms import randomize_bn

__all__ = ["tiny_network", "tiny_spec"]


def tiny_network(channels=3, classes=3):
    """Two blocks with branches and a head, in eval mode, the same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            MobileOneBlock(channels, 8, stride=2, num_conv_branches=2),
            MobileOneBlock(8, 8, groups=8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )
        return randomize_bn(model).eval()


def tiny_spec(channels=3, size=(32, 48), names=("a", "b", "c")):
    """Images of (channels, *size) with another mean and deviation in each channel."""
    mean, std = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.125, 0.25)
    return ExportSpec(
        "tiny", names, (channels, *size), mean[:channels], std[:channels], "bilinear", 0.9
    )
