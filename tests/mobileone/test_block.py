"""The block against arithmetic written out here."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    ConvNormAct,
    DropPath,
    GroupNorm1,
    LayerNorm2d,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from timm.models.byobnet import LayerFn
from torch import nn

from mobileone import MobileOneBlock
from tests.helpers.norms import randomize_bn

SHAPES = [
    {"in_chs": 3, "out_chs": 8, "stride": 2},  # stem
    {"in_chs": 8, "out_chs": 8, "groups": 8, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "stride": 2, "num_conv_branches": 2},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "dilation": 2},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 1, "num_conv_branches": 3},
    {"in_chs": 8, "out_chs": 12, "kernel_size": 1},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 5, "groups": 2},
]


def batch_normalized(z, bn):
    """BatchNorm of a training batch, written out."""
    mean = z.mean((0, 2, 3), keepdim=True)
    var = ((z - mean) ** 2).mean((0, 2, 3), keepdim=True)
    normal = (z - mean) / (var + bn.eps).sqrt()
    return normal * bn.weight[:, None, None] + bn.bias[:, None, None]


def expected_training_output(block, x):
    terms = []
    for branch in [*block.conv_kxk, block.conv_scale]:
        if branch is not None:
            conv = branch.conv
            z = F.conv2d(
                x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
            )
            terms.append(batch_normalized(z, branch.bn))
    if block.identity is not None:
        terms.append(batch_normalized(x, block.identity))
    return sum(terms).relu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_sums_the_normalized_branches(shape):
    block = randomize_bn(MobileOneBlock(**shape, dtype=torch.float64))
    x = torch.randn(4, shape["in_chs"], 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), expected_training_output(block, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation_is_one_convolution_and_equals_the_branches(shape, monkeypatch):
    block = randomize_bn(MobileOneBlock(**shape, dtype=torch.float64)).eval()
    x = torch.randn(2, shape["in_chs"], 9, 7, dtype=torch.float64)
    expected = block._sum_branches(x).relu()
    calls = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: calls.append(1) or conv2d(*a, **k))
    y = block(x)
    assert len(calls) == 1
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_evaluation_follows_a_changed_weight_at_once():
    block = randomize_bn(MobileOneBlock(4, 4, groups=4)).eval()
    x = torch.randn(1, 4, 5, 5)
    before = block(x)
    with torch.no_grad():
        block.conv_kxk[0].conv.weight.mul_(2)
        block.identity.running_mean.add_(1)
    after = block(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, block._sum_branches(x).relu())


def test_evaluation_is_differentiable():
    block = randomize_bn(MobileOneBlock(4, 4, groups=4, num_conv_branches=2)).eval()
    block(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_frozen_batch_norm_in_training_uses_the_one_convolution():
    block = randomize_bn(MobileOneBlock(4, 4, groups=4, dtype=torch.float64)).train()
    for bn in block.norms():
        bn.eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    buffers = [b.clone() for b in block.buffers()]
    y = block(x)
    torch.testing.assert_close(y, block._sum_branches(x).relu(), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(buffers, block.buffers(), strict=True))


def test_stochastic_depth_spares_the_skip():
    block = MobileOneBlock(4, 4, groups=4, drop_path_rate=0.999, dtype=torch.float64).train()
    assert isinstance(block.drop_path, DropPath)
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), batch_normalized(x, block.identity).relu())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_conv_branches": 0}, r"`num_conv_branches` \(=0\) must be at least 1"),
        ({"kernel_size": 2}, r"`kernel_size` \(=2\) must be odd"),
        ({"groups": 3}, r"`groups` \(=3\) must divide `in_chs` \(=8\)"),
        ({"use_skip": True, "stride": 2}, r"`stride` \(=2\) equal to 1"),
        ({"use_skip": True, "out_chs": 16}, r"`out_chs` \(=16\)"),
    ],
)
def test_bad_arguments_name_value_and_rule(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        MobileOneBlock(**{"in_chs": 8, "out_chs": 8, **arguments})


RULE = "must be a BatchNorm with running statistics, since only that folds exactly"


@pytest.mark.parametrize(
    ("norm_layer", "named"),
    [
        ("groupnorm", "GroupNormAct"),
        ("layernorm2d", "LayerNormAct2d"),
        ("evonormb0", "EvoNorm2dB0"),
        (nn.GroupNorm, "GroupNormAct"),
        (partial(LayerNorm2d, eps=1e-3), "LayerNormAct2d"),
    ],
    ids=str,
)
def test_models_with_a_norm_that_never_folds_are_refused(norm_layer, named):
    with pytest.raises(ValueError, match=rf"`norm_layer` \(={named}\) {RULE}.*'batchnorm'"):
        timm.create_model("mobileone_mu0", norm_layer=norm_layer)


@pytest.mark.parametrize(
    "layers",
    [
        LayerFn(norm_act=GroupNorm1),
        LayerFn(conv_norm_act=partial(ConvNormAct, norm_layer=GroupNorm1)),
        LayerFn(conv_norm_act=partial(ConvNormAct, apply_norm=False)),
        LayerFn(norm_act=partial(BatchNormAct2d, track_running_stats=False)),
    ],
    ids=["skip", "branch", "none", "no statistics"],
)
def test_blocks_with_a_norm_that_never_folds_are_refused(layers):
    with pytest.raises(ValueError, match=RULE):
        MobileOneBlock(8, 8, layers=layers)


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, freeze_batch_norm_2d])
def test_blocks_with_synchronized_or_frozen_norms_are_built(convert):
    def norm(channels, **kwargs):
        return convert(BatchNormAct2d(channels, **kwargs))

    block = MobileOneBlock(
        8, 8, layers=LayerFn(partial(ConvNormAct, norm_layer=norm), norm_act=norm)
    )
    assert not any(type(bn) is BatchNormAct2d for bn in block.norms())
    block.eval().fuse()


@pytest.mark.parametrize("norm_layer", ["batchnorm2d", nn.BatchNorm2d, BatchNormAct2d], ids=str)
def test_every_name_of_a_batch_norm_is_taken(norm_layer):
    timm.create_model("mobileone_mu0", norm_layer=norm_layer, device="meta")


def test_unknown_norms_are_left_to_timm():
    with pytest.raises(KeyError, match="nonorm"):
        timm.create_model("mobileone_mu0", norm_layer="nonorm")
