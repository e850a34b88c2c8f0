"""Smaller `.mlpackage`s: weights in 8 bits or as indices into a table; arithmetic stays float16."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mobileone.export.compress.bias_correction import correct_biases
from mobileone.export.formats import coreml
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.io.coremltools_noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = ["correct", "palettize", "quantize_weights"]

_USE = "Core ML compression"


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
