"""A complete network at once: quantized for training or without it, calibrated, and judged."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mobileone.block import FusedMobileOneBlock
from mobileone.quantization.deployed import QuantizedConv2d, QuantizedLinear
from mobileone.quantization.foldable import BLOCKS, PLAIN
from mobileone.quantization.layer import QuantizedLayer, Statistics
from mobileone.quantization.rounding import SCHEMES, Scales, Scheme
from mobileone.reparameterize import reparameterize

__all__ = ["calibrate_quantization", "conditions", "quantize", "quantize_trained", "scheme_of"]

_KINDS = (QuantizedLayer, QuantizedConv2d, QuantizedLinear)
_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")  # what timm calls


def quantize(
    model: nn.Module,
    scheme: Scheme = "int8",
    *,
    statistics: Statistics = "frozen",
    kappa: float = 1.0,
    scales: Scales = "learned",
) -> nn.Module:
    """Let every foldable block of a network, and its other products, compute as integers will.

    Each block becomes one convolution of its rounded input with its rounded folded kernel, a
    differentiable function of all of its branches. The state dict keeps its names; quantizers add
    `input_quantizer` and `weight_quantizer` to each. A float network's state dict loads as well.
    `mobileone.reparameterize` turns the result into integer layers.

    Args:
        model: A network with blocks in training form, float weights inside; changed in place.
        scheme: "int8"; "int4": weights of 4 bits; "palette4": 16 values a layer for its weights.
            Inputs of layers have 8 bits in each.
        statistics: BatchNorm's in training: "frozen", "exact" or "diagonal".
        kappa: κ of noise-aware folding; 0 folds as a float network does.
        scales: "learned" by gradient, or "running" extremes.

    Returns:
        The model; or another module, where the model itself is a block.

    Raises:
        ValueError: An argument is unknown, there is no block to fold, or one that is not known.

    Example:
        >>> model = quantize(timm.create_model("mobileone_s0"))
        >>> calibrate_quantization(model, batches)
        >>> fused = mobileone.reparameterize(model)
    """
    for name, value, known in (
        ("scheme", scheme, SCHEMES),
        ("statistics", statistics, get_args(Statistics)),
        ("scales", scales, get_args(Scales)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(known)}")
    if not 0 <= kappa < float("inf"):
        raise ValueError(f"`kappa` (={kappa}) must be at least 0 and finite")
    holder = nn.ModuleList([model])
    found, others = _replaceable(holder)
    if others:
        name, block = others[0]
        raise ValueError(
            f"{name[2:]} ({type(block).__module__}.{type(block).__name__}) folds in a way that "
            f"quantization does not know: it knows {_known()}"
        )
    if not any(type(block) in BLOCKS for _, block in found):
        raise ValueError(
            f"{type(model).__name__} has no block with branches to fold: quantization trains "
            f"{_known()}"
        )
    for name, block in found:
        if statistics != "frozen" and type(block) in BLOCKS and not BLOCKS[type(block)].sums:
            raise ValueError(
                f"`statistics` (={statistics!r}) needs blocks that are sums of branches, which "
                f"{name[2:]} ({type(block).__name__}) is not: choose 'frozen'"
            )
    return _replaced(holder, found, (scheme, statistics, kappa, scales))


def quantize_trained(
    model: nn.Module,
    batches: Sequence[Tensor],
    scheme: Scheme = "int8",
    *,
    kappa: float = 1.0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> nn.Module:
    """The network of integers of a trained network of floats, without training it.

    Where its blocks are known, they are folded with the noise of rounding; others as they fold.

    Args:
        model: In any mode; it stays as it is.
        batches: Normalized training images, (N, C, H, W) each; at least one.
        scheme: As of `quantize`.
        kappa: The same.
        mean: As of `calibrate_quantization`.
        std: The same.

    Raises:
        ValueError: It has neither a convolution nor a linear layer, or there are no images.
    """
    holder = nn.ModuleList([deepcopy(model).eval()])
    found, others = _replaceable(holder)
    if others:
        holder = nn.ModuleList([reparameterize(holder[0])])
        found, _ = _replaceable(holder)
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution and no linear layer to round")
    options: _Options = (scheme, "frozen", kappa, "running")
    network = _replaced(holder, found, options, *(batch[:1] for batch in batches[:1]))
    calibrate_quantization(network, batches, mean=mean, std=std)
    return reparameterize(network)


_Named = list[tuple[str, nn.Module]]
_Options = tuple[Scheme, Statistics, float, Scales]


def _replaced(
    holder: nn.Module, found: _Named, options: _Options, image: Tensor | None = None
) -> nn.Module:
    """The module inside of a holder, with quantized layers for those that were found."""
    for number, (name, block) in enumerate(found):
        holder.set_submodule(name, QuantizedLayer(block, *options, image=number == 0))
    network = holder.get_submodule("0")
    for layer in _read_elsewhere(network, image):
        layer.round_output()
    return network


def _replaceable(holder: nn.Module, prefix: str = "") -> tuple[_Named, _Named]:
    """Blocks and plain layers by name, in the order of modules; folded blocks are plain inside.

    And those that fold in an unknown way.
    """
    found, others = _Named(), _Named()
    for child_name, child in holder.named_children():
        name = f"{prefix}{child_name}"
        folded = isinstance(child, FusedMobileOneBlock) or _has(child, "reparam_conv")
        if type(child) in PLAIN or (type(child) in BLOCKS and not folded):
            found.append((name, child))
            continue
        if prefix and not folded and any(_has(child, fold) for fold in _FOLDS):
            others.append((name, child))
            continue
        inside = _replaceable(child, f"{name}.")
        found, others = found + inside[0], others + inside[1]
    return found, others


@torch.no_grad()
def _read_elsewhere(model: nn.Module, image: Tensor | None = None) -> list[QuantizedLayer]:
    """The layers of which more than a ReLU and layers reads the sum; found by one pass.

    Their integer kernels need the grid of what they write: pooling, attention and residual sums
    take other numbers than the next layer's input. Without an image, zeros of 64 pixels pass.
    """
    layers, first = layers_of(model).values(), next(iter(layers_of(model).values()))
    weight, geometry = first.row.conv(first).weight, first.geometry
    size = (weight.shape[1] * geometry[3], 64, 64) if geometry else weight.shape[1:]
    image = weight.new_zeros(1, *size) if image is None else image
    modes = [(module, module.training) for module in model.modules()]
    readers = _Readers()
    hooks = [hook for layer in layers for hook in readers.follow(layer)]
    try:
        with readers:
            model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return readers.found


class _Readers(TorchFunctionMode):
    """Sees which outputs of layers go into a function outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outputs, self.found = 0, dict[int, Any](), list[QuantizedLayer]()

    def follow(self, layer: QuantizedLayer) -> list[Any]:
        return [
            layer.register_forward_pre_hook(self._enter),
            layer.register_forward_hook(self._leave),
        ]

    def _enter(self, layer: nn.Module, inputs: Any) -> None:
        self.inside += 1

    def _leave(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(layer, QuantizedLayer)
        self.inside -= 1
        self.outputs[id(output)] = layer, output  # kept, so that no other gets its number
        if any(type(module) is not nn.ReLU for module in layer.followers()):
            self.found.append(layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and isinstance(result, Tensor):
            for value in tree_leaves((args, kwargs)):
                layer, _ = self.outputs.get(id(value), (None, None))
                if layer is not None and layer not in self.found:
                    self.found.append(layer)
        return result


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def _known() -> str:
    return ", ".join(f"{block.__module__}.{block.__name__}" for block in BLOCKS)


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name, in the order of its modules."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def scheme_of(model: nn.Module) -> Scheme | None:
    """How a network, in training form or of integers, is quantized; None: it is not."""
    return next((m.scheme for m in model.modules() if isinstance(m, _KINDS)), None)


@torch.no_grad()
def calibrate_quantization(
    model: nn.Module,
    batches: Iterable[Tensor],
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> None:
    """Find the steps of all inputs and of all weights, one layer after the other, on images.

    A layer's grid holds all that it sees behind the rounded layers before it. Modes are put back.

    Args:
        model: What `quantize` returned.
        batches: Normalized images (N, C, H, W), such as it will be trained on, on its device.
        reduce: The maximum over processes, where several see different images.
        mean: Of the normalization of 8-bit images, a number a channel: the images' grid then holds
            black and white, also where the batches have neither. Empty takes what is seen.
        std: The same.

    Raises:
        ValueError: There is no quantized layer, or there are no images.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: call quantize first")
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        for layer in layers.values():
            layer.calibrating = True
            for quantizer in layer.quantizers():
                quantizer.step.fill_(torch.nan)
        if mean and std:
            first = next(iter(layers.values()))
            middle, width = (first.input_quantizer.step.new_tensor(each) for each in (mean, std))
            first.input_quantizer.observe((-middle / width).min(), ((1 - middle) / width).max())
            first.fit_weights()
        for images in batches:
            model(images)
            seen += 1
    finally:
        for layer in layers.values():
            layer.calibrating = False
        for module, training in modes:
            module.training = training
    if not seen:
        raise ValueError("no images to calibrate on: give at least one batch")
    for layer in layers.values():
        if not layer.input_quantizer.calibrated:
            continue  # no image got there
        for quantizer in layer.quantizers():
            low, high = quantizer.extremes()
            quantizer.observe(-reduce(-low), reduce(high))
        layer.fit_weights()  # on the common step: equal on all processes


def conditions(model: nn.Module) -> dict[str, float]:
    """Of each quantized layer by name, the largest change of an output by one step of one input.

    Integers and simulation differ by such steps: where it is large, by much.

    Args:
        model: What `quantize` returned, calibrated; or a network of integers.
    """
    return {n: m.condition() for n, m in model.named_modules() if isinstance(m, _KINDS)}
