"""Training in channels-last, the layout that compilers choose for convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, path_of
from mobileone.folding import StridedPointwise
from tests.helpers.processes import run_program


def test_the_stem_trains_in_channels_last():
    run_program("train_stem.py", timeout=120)


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (1, 1)])
def test_the_scale_branch_is_the_strided_convolution(size):
    block = MobileOneBlock(3, 8, stride=2).double()
    conv = block.conv_scale.conv
    assert (type(conv), conv.stride) == (StridedPointwise, (2, 2))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, stride=2))
    assert type(MobileOneBlock(8, 8, stride=2, groups=8).conv_scale.conv) is nn.Conv2d
    assert "StridedPointwise(3, 8, kernel_size=(1, 1), stride=(2, 2)" in repr(block)


def test_kernels_in_channels_last_give_the_same_gradients():
    block = MobileOneBlock(192, 192, 1)
    exact = copy.deepcopy(block).double()
    set_collapse(exact, "never")
    block.to(memory_format=torch.channels_last)
    x, g = torch.randn(2, 8, 192, 28, 28)
    assert path_of(block, x) is not Path.BRANCHES
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    for one, image, gradient in zip((block, exact), inputs, (g, g.double()), strict=True):
        one(image).backward(gradient)
    error = (inputs[0].grad - inputs[1].grad).abs().max() / inputs[1].grad.abs().max()
    assert error < 1e-5
    for own, other in zip(block.parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).abs().max() < 1e-4 * other.grad.abs().max()
