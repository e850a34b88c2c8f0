"""The Triton kernels, interpreted, against the branches: interpret_triton.py CASES.

CASES: JSON of (stride, (height, width), number of branches, dtype).
"""

import copy
import json
import sys

import torch

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, depthwise, dispatch, triton_kernels

depthwise.kernels_for = lambda x: triton_kernels
dispatch.choose = lambda *_: Path.DEPTHWISE


def outcome(network, image, output, g):
    output.backward(g.to(output.dtype))
    gradients = [p.grad for p in network.parameters()]
    return [t.double() for t in (output, image.grad, *gradients, *network.buffers())]


def compare(stride, size, branches, dtype):
    block = MobileOneBlock(2, 2, groups=2, stride=stride, num_conv_branches=branches)
    if dtype != torch.float32:
        block.act = torch.nn.Identity()  # else a rounding tosses what an output near 0 passes back
    theirs = copy.deepcopy(block)
    set_collapse(theirs, "never")
    exact = copy.deepcopy(theirs).double()
    x = (torch.randn(3, 2, *size) + 3).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert dispatch.plan_collapsed(block, x).path is Path.DEPTHWISE
        y = block(x)
    assert y.dtype == dtype
    g = torch.randn_like(y)
    ours, wide = outcome(block, x, y, g), x.detach().double().requires_grad_()
    truth, narrow = outcome(exact, wide, exact(wide), g), x.detach().float().requires_grad_()
    expected = outcome(theirs, narrow, theirs(narrow), g)
    tolerance = 5e-5 if dtype == torch.float32 else 3e-2
    for mine, branch, right in zip(ours, expected, truth, strict=True):
        error, allowed = (mine - right).abs().max(), 4 * (branch - right).abs().max()
        allowed += tolerance * right.abs().max().clamp(min=0.1)
        assert error <= allowed, (size, dtype, error, allowed)


torch.manual_seed(0)
for stride, size, branches, dtype in json.loads(sys.argv[1]):
    compare(stride, size, branches, getattr(torch, dtype))
print("agreed")
