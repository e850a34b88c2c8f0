"""Collapsed training against timm's block with the same weights, in float64."""

import pytest
import timm
import torch
from timm.models import byobnet
from torch import nn

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, path_of
from mobileone.collapsed.branches import describe, parameters
from mobileone.collapsed.functions import CollapsedConvolution
from tests.helpers import twin
from tests.helpers.norms import randomize_bn
from tests.helpers.variants import middle_is_slow

SHAPES = [
    {"in_chs": 3, "out_chs": 8, "stride": 2},  # stem
    {"in_chs": 8, "out_chs": 8, "groups": 8},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "stride": 2, "num_conv_branches": 2},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "stride": 2},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 1},
    {"in_chs": 8, "out_chs": 12, "kernel_size": 1},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 1, "num_conv_branches": 5},
    {"in_chs": 8, "out_chs": 12, "kernel_size": 1, "num_conv_branches": 3},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 5, "groups": 2},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 5, "groups": 8, "num_conv_branches": 2},
    {"in_chs": 8, "out_chs": 12, "groups": 4, "num_conv_branches": 2},
]
SIZES = [(4, 9, 7), (1, 16, 16), (3, 1, 1), (1, 3, 2), (2, 12, 11)]


def agree(ours, theirs, x, path):
    """Assert that both blocks take the same step, ours in the given form."""
    assert path_of(ours, x) is path
    g = torch.randn_like(ours.eval()(x))
    twin.assert_same(twin.step(ours.train(), x, g), twin.step(theirs, x, g))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_trains_as_timms_block(shape, size):
    ours, theirs = twin.build(shape)
    set_collapse(ours, "always")
    agree(ours, theirs, twin.feature_map(size[0], shape["in_chs"], *size[1:]), Path.GRAM)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_move_as_batch_norms_do(momentum):
    ours, theirs = twin.build({"in_chs": 4, "out_chs": 4, "groups": 4})
    set_collapse(ours, "always")
    for block in (ours, theirs):
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
    for _ in range(3):
        agree(ours, theirs, twin.feature_map(2, 4, 5, 5), Path.GRAM)
        ours.zero_grad(), theirs.zero_grad()
    assert ours.identity.num_batches_tracked == 3


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7]], ids=str)
def test_attention_follows_the_collapsed_sum(shape):
    ours, theirs = twin.build(shape, attn=True)
    set_collapse(ours, "always")
    agree(ours, theirs, twin.feature_map(3, 8, 7, 9), Path.GRAM)


@pytest.mark.parametrize("size", [(4, 9, 7), (1, 16, 16), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6]], ids=str)
@pytest.mark.parametrize("attn", [False, True])
def test_the_affine_form_trains_as_timms_block(shape, size, attn, monkeypatch):
    ours, theirs = twin.build(shape, attn=attn)
    monkeypatch.setattr("mobileone.collapsed.dispatch.choose", lambda *_: Path.AFFINE)
    x = twin.feature_map(size[0], 8, *size[1:])
    g = torch.randn_like(ours.eval()(x))
    twin.assert_same(twin.step(ours.train(), x, g), twin.step(theirs, x, g))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_dilation_collapses_as_well(kernel_size):
    # timm's block ignores dilation: compare with our own branches
    block, _ = twin.build({"in_chs": 6, "out_chs": 6, "groups": 6})
    block = randomize_bn(
        MobileOneBlock(6, 6, kernel_size, dilation=2, groups=6, dtype=torch.float64)
    )
    x = twin.feature_map(2, 6, 11, 8)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    set_collapse(block, "always")
    assert path_of(block, x) is Path.GRAM
    g = torch.randn_like(x)
    collapsed = {name: value.clone() for name, value in twin.step(block, x, g).items()}
    block.zero_grad(), block.load_state_dict(state), set_collapse(block, "never")
    twin.assert_same(collapsed, twin.step(block, x, g))


def test_stochastic_depth_runs_the_branches():
    block = randomize_bn(MobileOneBlock(4, 4, groups=4, drop_path_rate=0.5, dtype=torch.float64))
    set_collapse(block, "always")
    x = twin.feature_map(64, 4, 5, 5)
    assert path_of(block, x) is Path.BRANCHES
    y, skip = block(x), block.identity(x).relu()
    dropped = torch.isclose(y, skip).flatten(1).all(1)
    assert 10 < dropped.sum() < 54


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        *((Path.GRAM, shape) for shape in SHAPES),
        *((Path.STACKED, shape) for shape in SHAPES),
        *((Path.AFFINE, shape) for shape in SHAPES[5:7]),  # one pointwise branch
    ],
    ids=str,
)
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(path, shape, relu):
    few = {key: min(value, 4) if "chs" in key else value for key, value in shape.items()}
    few["groups"] = min(few.get("groups", 1), 4)
    block = randomize_bn(MobileOneBlock(**few, dtype=torch.float64))
    geometry = describe(block)
    x = twin.feature_map(2, few["in_chs"], 4, 3).requires_grad_()

    def output(x, *tensors):
        return CollapsedConvolution.apply(x, path, geometry, relu, torch.float64, *tensors)[0]

    assert torch.autograd.gradcheck(output, (x, *parameters(block)))


@pytest.mark.parametrize("variant", middle_is_slow(f"mobileone_s{n}" for n in range(5)))
def test_whole_networks_train_as_timms(variant):
    theirs = randomize_bn(getattr(byobnet, variant)(num_classes=5)).double()
    ours = timm.create_model(variant, num_classes=5).double()
    ours.load_state_dict(theirs.state_dict())
    set_collapse(ours, "always")
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    g = torch.randn(2, 5, dtype=torch.float64)
    twin.assert_same(twin.step(ours, x, g), twin.step(theirs, x, g))


def test_an_unknown_mode_or_a_foreign_model_is_an_error():
    with pytest.raises(ValueError, match=r"'sometimes'.*'auto', 'always', 'never'"):
        set_collapse(MobileOneBlock(4, 4), "sometimes")
    with pytest.raises(ValueError, match="no MobileOne block"):
        set_collapse(nn.Conv2d(3, 3, 1), "never")
