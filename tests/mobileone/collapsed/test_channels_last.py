"""Training in channels-last, the layout that compilers choose for convolutions."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, path_of
from mobileone.folding import StridedPointwise

# oneDNN's fault in strided 1×1 convolutions of few channels ends the process or hangs it, hence a
# process of its own; at 16 images of 224 px it never went unnoticed
_PROGRAM = """
import torch
from mobileone import MobileOneBlock
from mobileone import set_collapse

block = MobileOneBlock(3, 48, stride=2, num_conv_branches=1)
set_collapse(block, "never")
x = torch.randn(16, 3, 224, 224)
gradients = []
for layout in (torch.contiguous_format, torch.channels_last):
    block.zero_grad()
    block.to(memory_format=layout)
    block(x.to(memory_format=layout)).square().sum().backward()
    gradients.append([p.grad.clone() for p in block.parameters()])
for plain, last in zip(*gradients):
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
"""


def test_the_stem_trains_in_channels_last():
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


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
