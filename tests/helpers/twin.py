"""timm's block next to ours, and a training step of either."""

import copy

import torch
from timm.models import byobnet
from torch import nn

from mobileone import MobileOneBlock
from tests.helpers.norms import randomize_bn

__all__ = ["assert_same", "build", "feature_map", "known", "relative_errors", "rms", "step"]


def build(shape, dtype=torch.float64, attn=False):
    """Our block and timm's with the same weights and worn-in BatchNorms."""
    layers = byobnet.get_layer_fns(byobnet.model_cfgs["mobileone_s4"])
    if not attn:
        layers.attn = None
    shape = {"kernel_size": 3, "stride": 1, "groups": 1, "num_conv_branches": 1, **shape}
    ours = randomize_bn(MobileOneBlock(**shape, layers=layers, dtype=dtype))
    for parameter in ours.parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter)
    groups = shape["groups"]
    theirs = byobnet.MobileOneBlock(
        shape["in_chs"],
        shape["out_chs"],
        shape["kernel_size"],
        shape["stride"],
        group_size=None if groups == 1 else shape["in_chs"] // groups,
        num_conv_branches=shape["num_conv_branches"],
        layers=layers,
        dtype=dtype,
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(block, x, g=None):
    """Output, gradients and buffers after one training step's forward and backward pass."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(torch.randn_like(y) if g is None else g)
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(block.named_buffers())}


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().double().item()
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * max(scale, 1e-3), f"{name}: {error:.1e} of {scale:.1e}"


def feature_map(batch, channels, height, width, dtype=torch.float64):
    """An input as the previous block leaves it: rectified, with a mean."""
    return (torch.randn(batch, channels, height, width, dtype=torch.float64) + 0.5).relu().to(dtype)


def relative_errors(actual, truth):
    """Root mean square errors of every tensor of a step, by the truth's root mean square."""
    return {name: rms(actual[name].double() - value) / rms(value) for name, value in truth.items()}


def known(block, x, g):
    """A step in float64, without what is zero but for rounding: counters, and the tensors of which
    the step on the images in the other order shares no four digits."""
    turned = step(copy.deepcopy(block), x.flip(0), g.flip(0))
    for name in ("y", "x"):
        turned[name] = turned[name].flip(0)
    truth = step(copy.deepcopy(block), x, g)
    return {
        name: value
        for name, value in truth.items()
        if value.is_floating_point() and rms(turned[name] - value) < 1e-4 * rms(value)
    }


def rms(tensor):
    largest = tensor.abs().max().item() or 1.0  # squares of values near overflow are not numbers
    return largest * (tensor / largest).square().mean().sqrt().item()
