"""The cost model against what was measured: which form wins in which dtype and layout."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, path_of
from mobileone.collapsed import cost_model as policy
from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.affine import _in_rows
from mobileone.collapsed.branches import describe

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no compiler for the kernels")


def chosen(block, pixels, dtype, channels_last, kernels=True):
    """What 16 images get, of `pixels` rows and columns after the stride."""
    with torch.device("meta"):
        geometry = describe(MobileOneBlock(**block))
    setting = policy.Setting("cpu", dtype, kernels, channels_last)
    return policy.choose(geometry, 16 * pixels**2, pixels, setting, "auto")


def pointwise(inputs, outputs, branches):
    widths = {"in_chs": inputs, "out_chs": outputs}
    return {**widths, "kernel_size": 1, "num_conv_branches": branches}


def depthwise(channels, branches, stride=1):
    widths = {"in_chs": channels, "out_chs": channels, "groups": channels}
    return {**widths, "stride": stride, "num_conv_branches": branches}


# CPU milliseconds, 16 images: form against branches, first in planes, then in channels-last
@pytest.mark.parametrize(
    ("block", "pixels", "planes", "channels_last"),
    [
        (pointwise(128, 128, 4), 16, Path.GRAM, Path.GRAM),  # 15.3 : 34.0, 19.7 : 25.3
        (pointwise(192, 192, 1), 16, Path.AFFINE, Path.BRANCHES),  # 16.6 : 18.8, 20.4 : 14.0
        (pointwise(512, 512, 1), 8, Path.AFFINE, Path.BRANCHES),  # 21.6 : 22.5, 25.2 : 19.5
        (depthwise(128, 4), 16, Path.DEPTHWISE, Path.DEPTHWISE),  # 7.3 : 21.2, 8.9 : 11.5
        (depthwise(96, 1), 32, Path.DEPTHWISE, Path.BRANCHES),  # 13.8 : 33.9, 27.2 : 17.9
        (depthwise(64, 1, 2), 32, Path.DEPTHWISE, Path.BRANCHES),  # 23.8 : 42.8, 53.7 : 18.0
        ({"in_chs": 3, "out_chs": 64, "stride": 2}, 64, Path.GRAM, Path.BRANCHES),  # 31:60, 65:43
    ],
)
def test_layouts_get_the_form_that_wins_in_them(block, pixels, planes, channels_last):
    assert chosen(block, pixels, torch.float32, False) is planes
    assert chosen(block, pixels, torch.float32, True) is channels_last


# the same under autocast to bfloat16, on a processor that multiplies it
@pytest.mark.parametrize(
    ("block", "pixels", "planes", "channels_last"),
    [
        (pointwise(48, 48, 4), 32, Path.GRAM, Path.BRANCHES),  # 10.9 : 18.7, 17.0 : 13.4
        (pointwise(128, 128, 4), 16, Path.GRAM, Path.BRANCHES),  # 14.8 : 18.1, 17.5 : 14.7
        (pointwise(256, 256, 4), 8, Path.BRANCHES, Path.BRANCHES),  # 19.4 : 15.0, 21.2 : 12.9
        (pointwise(256, 1024, 4), 4, Path.BRANCHES, Path.BRANCHES),  # 39.5 : 15.4, 41.7 : 14.7
        (pointwise(128, 128, 1), 28, Path.BRANCHES, Path.BRANCHES),  # 29.6 : 16.0
        (depthwise(128, 4), 16, Path.BRANCHES, Path.BRANCHES),  # 76 : 14, 81 : 10
        (depthwise(128, 4, 2), 8, Path.GRAM, Path.GRAM),  # 13.3 : 70.7, 15.1 : 66.6
        (depthwise(64, 1, 2), 32, Path.BRANCHES, Path.BRANCHES),  # 133 : 84, 168 : 75
        (depthwise(512, 1, 2), 4, Path.GRAM, Path.GRAM),  # 20.8 : 43.5, 23.3 : 43.0
    ],
)
def test_bfloat16_gets_the_form_that_wins_in_it(block, pixels, planes, channels_last, monkeypatch):
    monkeypatch.setattr(policy, "_multiplies_bf16", lambda: True)
    policy.choose.cache_clear()
    assert chosen(block, pixels, torch.bfloat16, False, kernels=False) is planes
    assert chosen(block, pixels, torch.bfloat16, True, kernels=False) is channels_last
    policy.choose.cache_clear()


@pytest.mark.parametrize("block", [pointwise(64, 64, 4), depthwise(64, 4)])
def test_on_cuda_blocks_collapse_only_where_they_are_asked_to(block):
    """Nobody has measured a form there, so `auto` must not choose one by a CPU's costs."""
    geometry, setting = (
        describe(MobileOneBlock(**block)),
        policy.Setting("cuda", torch.float16, False),
    )
    assert policy.choose(geometry, 50_000, 56, setting, "auto") is Path.BRANCHES
    assert policy.choose(geometry, 50_000, 56, setting, "always") is Path.STACKED


@needs_kernels
def test_the_layout_of_the_input_decides():
    block = MobileOneBlock(192, 192, 1)
    x = torch.randn(4, 192, 28, 28)
    assert path_of(block, x) is Path.AFFINE
    assert path_of(block, x.to(memory_format=torch.channels_last)) is Path.BRANCHES
    set_collapse(block, "always")
    assert path_of(block, x.to(memory_format=torch.channels_last)) is Path.GRAM


def test_without_kernels_outputs_go_back_to_channels_last():
    block = MobileOneBlock(16, 24, 1, num_conv_branches=4)
    branches = copy.deepcopy(block)
    set_collapse(block, "always")
    set_collapse(branches, "never")
    x = torch.randn(4, 16, 14, 14).to(memory_format=torch.channels_last)
    outputs = []
    for model in (block, branches):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(own)
        y.float().square().sum().backward()
        outputs.append((y.detach().float(), own.grad))
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert (outputs[0][0] - outputs[1][0]).norm() < 0.02 * outputs[1][0].norm()


def test_kernels_in_channels_last_do_not_turn_the_product():
    kernel = torch.randn(48, 32, 1, 1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8)
    assert not F.conv2d(x, kernel).is_contiguous()
    assert F.conv2d(x, _in_rows(kernel)).is_contiguous()
