"""Round a fused float network to integers after training, with scales from images."""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, fx, nn

from mobileone.quantization.deployed import (
    QuantizedConv2d,
    QuantizeDequantize,
    QuantizedLinear,
    round_bias,
)

__all__ = ["quantize_fused"]

_ATEN = torch.ops.aten
_LAYERS = (_ATEN.conv2d.default, _ATEN.linear.default)
_Ranges = dict[str, tuple[float, float]]
_RELUS = (_ATEN.relu.default, _ATEN.relu_.default)


@torch.no_grad()
def quantize_fused(fused: nn.Module, images: Tensor, bits: int = 8, batch: int = 32) -> nn.Module:
    """A copy of a fused network whose convolutions and linear layers are of integers.

    Ranges are the extremes on the images; weights are symmetric, one scale an output channel.

    Args:
        fused: Float network in eval mode on the CPU, without branches.
        images: Normalized, (N, C, H, W), N >= 1.
        bits: Of the weights.
        batch: How many images go through the network at once.

    Raises:
        ValueError: The network has neither a convolution nor a linear layer.
    """
    layers = {
        name: module
        for name, module in fused.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    if not layers:
        raise ValueError(f"{type(fused).__name__} has no convolution and no linear layer to round")
    rectified = dict(_needs_output(fused, images))
    inputs, outputs = _extremes(fused, layers, images.split(batch))
    copied = deepcopy(fused)
    for name, layer in layers.items():
        output = None
        if name in rectified:
            low, high = outputs[name]
            output = _grid(0.0 if rectified[name] else low, high)
        _replace(copied, name, _rounded(layer, _grid(*inputs[name]), output, bits))
    return copied


def _rounded(
    layer: nn.Conv2d | nn.Linear,
    input: QuantizeDequantize,
    output: QuantizeDequantize | None,
    bits: int,
) -> nn.Module:
    largest = 2 ** (bits - 1) - 1
    weight = layer.weight.detach()
    scale = weight.abs().flatten(1).amax(dim=1) / largest  # (C_out,)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny * 2**20)
    codes = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    bias = round_bias(bias, input.scale, scale)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(codes, scale, bias, input, output, bits)
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return QuantizedConv2d(codes, scale, bias, input, output, bits, **geometry)


def _grid(low: float, high: float) -> QuantizeDequantize:
    """256 steps from `low` to `high`, zero among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-8)
    return QuantizeDequantize(scale, min(255, round(-low / scale)))


def _extremes(
    network: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear], batches: tuple[Tensor, ...]
) -> tuple[_Ranges, _Ranges]:
    """The least and the largest input and output of each layer, by its name."""
    found: tuple[_Ranges, _Ranges] = ({}, {})

    def widen(name: str, given: tuple[Tensor, ...], result: Tensor) -> None:
        for ranges, value in zip(found, (given[0], result), strict=True):
            low, high = ranges.get(name, (torch.inf, -torch.inf))
            ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))

    handles = [
        layer.register_forward_hook(lambda _, given, result, name=name: widen(name, given, result))
        for name, layer in layers.items()
    ]
    try:
        for images in batches:
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _needs_output(fused: nn.Module, images: Tensor) -> Iterator[tuple[str, bool]]:
    """The layers that must round their outputs, and whether it is a ReLU that follows each.

    The others are followed by nothing but layers, which round their inputs, or are the last.
    """
    for node in torch.export.export(fused, (images[:1],)).graph.nodes:
        if node.target not in _LAYERS:
            continue
        users = list(node.users)
        relu = len(users) == 1 and users[0].target in _RELUS
        if relu:
            users = list(users[0].users)
        if not all(user.target in _LAYERS or user.op == "output" for user in users):
            yield _module_name(node), relu


def _module_name(node: fx.Node) -> str:
    """The innermost module that the operation belongs to."""
    path, _ = list(node.meta["nn_module_stack"].values())[-1]
    return str(path)


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
