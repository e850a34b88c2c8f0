"""The Triton kernels for CUDA, interpreted on a CPU, and the path choice there."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mobileone import MobileOneBlock
from mobileone.collapsed import Path, path_of
from mobileone.collapsed.branches import describe
from mobileone.collapsed.cost_model import Setting, choose
from tests.helpers import twin

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA wheels"
)

INTERPRETED = """
import copy, torch
from mobileone import MobileOneBlock
from mobileone.collapsed import Path, depthwise, dispatch, triton_kernels
from mobileone import set_collapse

depthwise.kernels_for = lambda x: triton_kernels
dispatch.choose = lambda *_: Path.DEPTHWISE
torch.manual_seed(0)
for stride, size, k, dtype in {cases}:
    block = MobileOneBlock(2, 2, groups=2, stride=stride, num_conv_branches=k)
    if dtype != torch.float32:
        block.act = torch.nn.Identity()  # else a rounding tosses what an output near 0 passes back
    branches = copy.deepcopy(block)
    set_collapse(branches, "never")
    exact = copy.deepcopy(branches).double()
    x = (torch.randn(3, 2, *size) + 3).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert dispatch.plan_collapsed(block, x).path is Path.DEPTHWISE
        y = block(x)
    assert y.dtype == dtype
    g = torch.randn_like(y)

    def outcome(network, image, output):
        output.backward(g.to(output.dtype))
        gradients = [p.grad for p in network.parameters()]
        return [t.double() for t in (output, image.grad, *gradients, *network.buffers())]

    ours, truth = outcome(block, x, y), outcome(exact, wide, exact(wide))
    narrow = x.detach().float().requires_grad_()
    theirs = outcome(branches, narrow, branches(narrow))
    tolerance = 5e-5 if dtype == torch.float32 else 3e-2
    for mine, branch, right in zip(ours, theirs, truth):
        error, allowed = (mine - right).abs().max(), 4 * (branch - right).abs().max()
        allowed += tolerance * right.abs().max().clamp(min=0.1)
        assert error <= allowed, (size, dtype, error, allowed)
print("agreed")
"""


def interpret(cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.replace("{cases}", cases)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "agreed\n", done.stderr


@needs_triton
def test_the_triton_kernels_train_as_the_branches():
    interpret("[(1, (5, 4), 1, torch.float32), (2, (5, 6), 2, torch.float32)]")


@needs_triton
@pytest.mark.slow
def test_the_triton_kernels_take_every_size_and_half_precision():
    cases = [
        (1, (1, 1), 1, "float32"),
        (1, (1, 4), 1, "float32"),
        (2, (2, 3), 1, "float32"),
        (1, (19, 13), 2, "float32"),  # several blocks
        (2, (37, 41), 1, "float32"),
        (1, (6, 5), 1, "bfloat16"),
        (2, (6, 5), 1, "float16"),
    ]
    rows = (f"({s}, {size}, {k}, torch.{dtype})" for s, size, k, dtype in cases)
    interpret(f"[{', '.join(rows)}]")


@pytest.mark.parametrize("kernels", [True, False])
def test_on_cuda_blocks_collapse_only_where_they_are_asked_to(kernels):
    """Nobody has measured a form there, so `auto` must not choose one by a CPU's costs."""
    setting = Setting("cuda", torch.float16, kernels)
    depthwise = describe(MobileOneBlock(64, 64, groups=64, num_conv_branches=4))
    pointwise = describe(MobileOneBlock(64, 64, 1, num_conv_branches=4))
    for geometry in (depthwise, pointwise):
        assert choose(geometry, 50_000, 56, setting, "auto") is Path.BRANCHES
    form = Path.DEPTHWISE if kernels else Path.GRAM
    assert choose(depthwise, 50_000, 56, setting, "always") is form
    assert choose(pointwise, 50_000, 56, setting, "always") is Path.GRAM


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_triton
@pytest.mark.parametrize("stride", [1, 2])
def test_on_a_cuda_device_the_kernels_train_as_timms_block(stride):
    shape = {"in_chs": 8, "out_chs": 8, "groups": 8, "num_conv_branches": 4, "stride": stride}
    ours, theirs = (block.cuda() for block in twin.build(shape, dtype=torch.float32))
    x = twin.feature_map(8, 8, 56, 55, dtype=torch.float32).cuda()
    assert path_of(ours, x) is Path.DEPTHWISE
    g = torch.randn_like(ours.eval()(x))
    actual, expected = twin.step(ours.train(), x, g), twin.step(theirs.double(), x.double(), g)
    twin.assert_same(actual, expected, tolerance=1e-4)
