"""Smaller `.mlpackage`s: weights as indices into a table; arithmetic stays float16.

Rounded weights shift a layer's mean output by `E[Wq x] - E[W x]`, channel by channel, and the next
layers add to it. The shift is measured on images and taken off the bias (Nagel et al., ICCV 2019,
arXiv 1906.04721, section 4.2), layer after layer, each on the outputs of those already corrected.
"""

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.formats import coreml
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.layers import layers_in_order, on_layers
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = ["correct_biases", "palettize", "write_palettes"]

_USE = "Core ML compression"
_UNLIKE = 0.5  # rounded weights are nearer to their own than this


def write_palettes(
    network: nn.Module, spec: ExportSpec, path: Path, images: Tensor | None, *, bits: int
) -> None:
    """Save a package of indices into a table of 2^bits values a layer.

    Args:
        network: fused, in eval mode.
        spec: what it expects.
        path: of the package; must not exist.
        images: normalized, (N, C, H, W), to correct the biases on; None leaves them as they are.
        bits: of an index.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, first = (Path(folder) / f"{name}.mlpackage" for name in ("source", "first"))
        coreml.write(network, spec, source, Metadata())
        if images is not None:
            # biases are not compressed: the same weights become the same rounded weights
            palettize(source, first, bits)
            weights = [weight for weight, _ in MLProgram(first).layers()]
            shutil.rmtree(source)
            coreml.write(correct_biases(network, weights, images), spec, source, Metadata())
        palettize(source, path, bits)


def palettize(source: Path, path: Path, bits: int) -> None:
    """Save a package with a table of 2^bits values a layer, found by k-means, in its place."""
    with quiet():
        ct = import_optional("coremltools", _USE, "coremltools")
        optimize = import_optional("coremltools.optimize.coreml", _USE, "coremltools")
        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
        chosen = optimize.OptimizationConfig(global_config=config)
        mlmodel = ct.models.MLModel(str(source), skip_model_load=True)
        optimize.palettize_weights(mlmodel, chosen).save(str(path))


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
