"""Dynamic activations against their formulas, written out element by element."""

import math

import pytest
import torch
from torch import nn

from mobileone.bench.studies.dynamic_activations import DynamicReLU, DynamicShiftMax


def coefficients(layer: nn.Sequential, image: torch.Tensor) -> list[float]:
    """θ of one image (C, H, W), by two matrix products on the means."""
    _, first, _, second = layer
    hidden = first.weight[:, :, 0, 0] @ image.mean(dim=(1, 2)) + first.bias
    return (second.weight[:, :, 0, 0] @ hidden.clamp(min=0) + second.bias).tolist()


@pytest.mark.parametrize("kind", ["A", "B"])
@torch.no_grad()
def test_dynamic_relu_is_its_formula(kind):
    layer = DynamicReLU(8, kind).double()
    nn.init.normal_(layer.theta[3].weight)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    y = layer(x)
    width = 1 if kind == "A" else 8
    for image, out in zip(x, y, strict=True):
        residual = [2 / (1 + math.exp(-t)) - 1 for t in coefficients(layer.theta, image)]
        assert len(residual) == 4 * width
        for c in range(8):
            a1, a2, b1, b2 = (residual[k * width + c % width] for k in range(4))
            for value, result in zip(image[c].flatten(), out[c].flatten(), strict=True):
                pieces = ((1 + a1) * value + 0.5 * b1, a2 * value + 0.5 * b2)
                assert float(result) == pytest.approx(float(max(pieces)), rel=1e-12)


@torch.no_grad()
def test_shift_max_is_its_formula():
    layer = DynamicShiftMax(8, groups=4).double()
    nn.init.normal_(layer.theta[3].weight, std=3)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    y = layer(x)
    for image, out in zip(x, y, strict=True):
        hard = [min(max(t / 6 + 0.5, 0), 1) for t in coefficients(layer.theta, image)]
        own1, own2, other1, other2 = ([2 * h - 1 for h in hard[k : k + 8]] for k in (0, 8, 16, 24))
        for i in range(8):
            other = image[(i + 8 // 4) % 8]
            first = (1 + own1[i]) * image[i] + other1[i] * other
            second = own2[i] * image[i] + other2[i] * other
            assert torch.allclose(out[i], torch.maximum(first, second), rtol=1e-12)


@pytest.mark.parametrize(
    "layer", [DynamicReLU(8, "A"), DynamicReLU(8, "B"), DynamicShiftMax(8)], ids=["A", "B", "max"]
)
@torch.no_grad()
def test_without_residuals_they_are_relu(layer):
    nn.init.zeros_(layer.theta[3].weight)
    nn.init.zeros_(layer.theta[3].bias)
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), x.relu())


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"`groups` \(=4\) must divide `channels` \(=6\)"):
        DynamicShiftMax(6, groups=4)
