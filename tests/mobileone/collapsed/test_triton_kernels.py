"""The Triton kernels for CUDA, interpreted on a CPU, and the path choice there."""

import importlib.util
import json

import pytest
import torch

from mobileone import MobileOneBlock
from mobileone.collapsed import Path, path_of
from mobileone.collapsed.branches import describe
from mobileone.collapsed.cost_model import Setting, choose
from tests.helpers import twin
from tests.helpers.processes import run_program

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA wheels"
)


def interpret(*cases):
    variables = {"TRITON_INTERPRET": "1"}
    done = run_program("interpret_triton.py", json.dumps(cases), variables=variables, timeout=600)
    assert done.stdout == "agreed\n"


@needs_triton
def test_the_triton_kernels_train_as_the_branches():
    interpret((1, (5, 4), 1, "float32"), (2, (5, 6), 2, "float32"))


@needs_triton
@pytest.mark.slow
def test_the_triton_kernels_take_every_size_and_half_precision():
    interpret(
        (1, (1, 1), 1, "float32"),
        (1, (1, 4), 1, "float32"),
        (2, (2, 3), 1, "float32"),
        (1, (19, 13), 2, "float32"),  # several blocks
        (2, (37, 41), 1, "float32"),
        (1, (6, 5), 1, "bfloat16"),
        (2, (6, 5), 1, "float16"),
    )


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
