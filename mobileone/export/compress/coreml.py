"""Smaller `.mlpackage`s: weights in 8 bits or as indices into a table; arithmetic stays float16.

Rounded weights shift a layer's mean output by `E[Wq x] - E[W x]`, channel by channel, and the next
layers add to it. The shift is measured on images and taken off the bias (Nagel et al., ICCV 2019,
arXiv 1906.04721, section 4.2), layer after layer, each on the outputs of those already corrected.
"""

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.formats import coreml
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.layers import layers_in_order, on_layers
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.io.coremltools_noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = ["correct", "correct_biases", "palettize", "quantize_weights"]

_USE = "Core ML compression"
_UNLIKE = 0.5  # quantized weights are nearer to their own than this


def quantize_weights(source: Path, path: Path, calibration: Tensor) -> None:
    """8-bit integers and one scale an output channel."""
    _rewrite(
        source,
        path,
        "linear_quantize_weights",
        "OpLinearQuantizerConfig",
        mode="linear_symmetric",
        granularity="per_channel",
    )


def palettize(source: Path, path: Path, calibration: Tensor, *, bits: int) -> None:
    """Indices into a table of 2^bits values a layer, by k-means."""
    _rewrite(source, path, "palettize_weights", "OpPalettizerConfig", mode="kmeans", nbits=bits)


def correct(
    compress: Callable[[Path, Path, Tensor], None],
    network: nn.Module,
    spec: ExportSpec,
    source: Path,
    path: Path,
    calibration: Tensor,
) -> None:
    """Correct the biases of a package by the rounded weights that it holds.

    Biases are not compressed: the network is written again with its new ones, and the same
    weights become the same rounded weights.
    """
    weights = [weight for weight, _ in MLProgram(path).layers()]
    better = source.with_name(f"corrected-{path.name}")
    coreml.write(correct_biases(network, weights, calibration), spec, better, Metadata())
    shutil.rmtree(path)
    compress(better, path, calibration)


def _rewrite(source: Path, path: Path, function: str, config: str, **options: Any) -> None:
    """Call a function of `coremltools.optimize.coreml` with its configuration."""
    with quiet():
        ct = import_optional("coremltools", _USE, "coremltools")
        optimize = import_optional("coremltools.optimize.coreml", _USE, "coremltools")
        chosen = optimize.OptimizationConfig(global_config=getattr(optimize, config)(**options))
        mlmodel = ct.models.MLModel(str(source), skip_model_load=True)
        getattr(optimize, function)(mlmodel, chosen).save(str(path))


@torch.no_grad()
def correct_biases(network: nn.Module, weights: Sequence[Tensor], images: Tensor) -> nn.Module:
    """A copy of a network whose biases make up for the rounding of its weights.

    Args:
        network: fused, in eval mode; (N, C, H, W) -> (N, classes).
        weights: those of its convolutions and linear layers, rounded, in the order of execution.
        images: normalized, (N, C, H, W); activations are held for all of them at once.

    Returns:
        The network with its own weights and new biases.

    Raises:
        ValueError: the weights are not the network's.
    """
    means: list[Tensor] = []
    with on_layers(network, lambda layer, _, y: means.append(_mean_by_channel(layer, y))):
        network(images)
    corrected = copy.deepcopy(network)
    with layers_in_order(corrected) as layers:
        corrected(images[:1])
    own = [layer.weight.detach().clone() for layer in layers]
    _check(weights, own)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)
    expected = iter(means)

    def correct(layer: Any, _: Any, output: Tensor) -> Tensor:
        shift = next(expected) - _mean_by_channel(layer, output)
        bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
        layer.bias = nn.Parameter(bias + shift, requires_grad=False)
        return output + (shift.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else shift)

    with on_layers(corrected, correct):
        corrected(images)
    for layer, weight in zip(layers, own, strict=True):
        layer.weight.copy_(weight)
    return corrected


def _mean_by_channel(layer: Any, output: Tensor) -> Tensor:
    """(N, C, H, W) of a convolution, (..., C) of a linear layer -> (C,)."""
    if isinstance(layer, nn.Conv2d):
        return output.mean((0, 2, 3))
    return output.flatten(0, -2).mean(0)


def _check(weights: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    shapes, expected = ([tuple(w.shape) for w in list_] for list_ in (weights, own))
    alike = shapes == expected and all(
        float((a - b).norm()) <= _UNLIKE * float(b.norm())
        for a, b in zip(weights, own, strict=True)
    )
    if not alike:
        raise ValueError(
            f"the {len(weights)} weights in the file are not the network's {len(own)} in their "
            "order: the converter has changed them, so that their biases cannot be corrected"
        )
