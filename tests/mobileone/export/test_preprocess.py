import copy

import torch
from torch import nn

from mobileone.export.preprocess import WithPreprocessing, normalize
from tests.helpers.tiny import tiny_spec


def reference(images, spec):
    rows = [
        (images[:, c].double() / 255 - spec.mean[c]) / spec.std[c] for c in range(images.shape[1])
    ]
    return torch.stack(rows, dim=1)


def test_normalize_is_per_channel():
    spec = tiny_spec(4)
    images = torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8)
    assert torch.allclose(normalize(images, spec).double(), reference(images, spec), atol=1e-5)


def test_the_layer_is_exact_at_the_borders_too_where_folding_into_the_convolution_is_not():
    spec = tiny_spec()
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    head = nn.Sequential(conv, nn.Flatten(1)).double()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = head(reference(images, spec)).softmax(1)
    layer = WithPreprocessing(head, spec)
    # the float32 constants of the spec are what limits this, not the arithmetic
    layer.mean = 255 * torch.tensor(spec.mean, dtype=torch.float64).view(1, -1, 1, 1)
    layer.scale = 1 / (255 * torch.tensor(spec.std, dtype=torch.float64).view(1, -1, 1, 1))
    assert torch.allclose(layer(images.double()), expected, rtol=1e-11, atol=0)

    folded = copy.deepcopy(conv)
    scale = 1 / (255 * torch.tensor(spec.std, dtype=torch.float64)).view(1, -1, 1, 1)
    shift = (torch.tensor(spec.mean) / torch.tensor(spec.std)).double().view(1, -1, 1, 1)
    folded.weight.data = conv.weight * scale
    folded.bias.data = conv.bias - (conv.weight * shift).sum(dim=(1, 2, 3))
    difference = (folded(images.double()) - conv(reference(images, spec))).abs()
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-5
    assert difference[:, :, 0].max() > 0.1


def test_half_precision_costs_less_than_half_a_gray_level():
    spec = tiny_spec()
    pixels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    layer = WithPreprocessing(nn.Identity(), spec)
    half = (pixels.half() - layer.mean.half()) * layer.scale.half()
    gray_level = 1 / (255 * torch.tensor(spec.std)).view(1, 3, 1, 1)
    assert ((half.double() - reference(pixels, spec)).abs() / gray_level).max() < 0.5
