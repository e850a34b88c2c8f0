"""Is a written `.mlpackage` the trained network? The file itself is asked, on any machine."""

import copy
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.coreml import columns, runtime
from mobileone.export.mlprogram import MLProgram
from mobileone.export.parity import (
    NotVerifiedError,
    Parity,
    Reference,
    compare,
    fixed_images,
    measure,
)
from mobileone.export.preprocess import WithPreprocessing, normalise
from mobileone.export.spec import ExportSpec

__all__ = ["check"]

_HALF_STEP = 2.0**-24  # the distance of the smallest numbers in half precision
WEIGHTS_TOLERANCE = 5e-3  # a scale that was folded in before rounding to half precision


def check(
    path: Path,
    spec: ExportSpec,
    reference: Reference,
    *,
    precision: torch.dtype,
    tolerance: float,
    program_tolerance: float,
) -> dict[str, Parity]:
    """Compare a package with the network that it was made from, through its 8-bit image input.

    Args:
        path: the `.mlpackage`.
        spec: what the network expects.
        reference: the network, its answers, and the images.
        precision: in which the package states its weights.
        tolerance: for `parity` and `runtime_parity`.
        program_tolerance: for `program_parity`.

    Returns:
        `parity`: the program with the rounding that it states, against the trained network.
        `program_parity`: the program in float32 against the fused network with weights rounded
        to `precision`. No rounding noise remains, so that a single weight shows.
        `weights_parity`: each weight in the file against the fused network's, because one behind
        a ReLU that is never open changes no answer.
        `runtime_parity`, on macOS: Core ML itself, by probabilities.

    Raises:
        ValueError: the package's labels or input are not the spec's.
    """
    return {
        "parity": measure(partial(_stated, path, spec, reference, tolerance)),
        "program_parity": measure(
            partial(_exact, path, spec, reference, precision, program_tolerance)
        ),
        "weights_parity": measure(partial(_weights, path, spec, reference, precision)),
    } | (
        {"runtime_parity": measure(partial(_native, path, spec, reference, tolerance))}
        if sys.platform == "darwin"
        else {}
    )


def _stated(path: Path, spec: ExportSpec, reference: Reference, tolerance: float) -> Parity:
    answer = MLProgram(path).predict(reference.images)
    order = columns(answer, spec)
    return compare(reference.logits, answer.logits[:, order], "logits", tolerance)


def _exact(
    path: Path,
    spec: ExportSpec,
    reference: Reference,
    precision: torch.dtype,
    tolerance: float,
) -> Parity:
    # the synthetic images have colours: gray ones cannot tell RGB from BGR
    images = torch.cat([reference.images, fixed_images(spec, 2)])
    answer = MLProgram(path).predict(images, rounding=False)
    order = columns(answer, spec)
    logits = _rounded_logits(spec, reference.model, images, precision)
    return compare(logits, answer.logits[:, order], "logits", tolerance)


@torch.no_grad()
def _rounded_logits(
    spec: ExportSpec, fused: nn.Module, images: Tensor, precision: torch.dtype
) -> Tensor:
    """Logits of the fused network, in float32, with weights that went through `precision`."""
    network = WithPreprocessing(copy.deepcopy(fused), spec)
    return network.to(precision).float().logits(images.float())


@torch.no_grad()
def _weights(path: Path, spec: ExportSpec, reference: Reference, precision: torch.dtype) -> Parity:
    written = MLProgram(path).weights()
    with _layers_in_order(reference.model) as layers:
        reference.model(normalise(reference.images[:1], spec))
    own = [layer.weight.to(precision).float() for layer in layers]
    if Counter(w.shape for w in written) != Counter(w.shape for w in own):
        raise NotVerifiedError("the converter has rearranged the layers")
    errors = [  # parallel layers may stand in another order
        0.0
        if torch.equal(a, b)
        else min(_up_to_channel_scales(a, other) for other in own if other.shape == a.shape)
        for a, b in zip(written, own, strict=False)
    ]
    return Parity(
        "measured", kind="weights", max_relative_error=max(errors), tolerance=WEIGHTS_TOLERANCE
    )


def _up_to_channel_scales(written: Tensor, own: Tensor) -> float:
    """Largest difference in units of each output channel's largest weight.

    A converter may fold a scale that follows into the weights: one factor an output channel.
    """
    a, b = written.flatten(1), own.flatten(1)
    # fitted without the largest weight: if that one is wrong it must not set the factor
    others = b.clone().scatter(1, b.abs().argmax(dim=1, keepdim=True), 0)
    scaled = b * (a * others).sum(dim=1, keepdim=True) / (b * others).sum(dim=1, keepdim=True)
    difference = ((a - scaled).abs().amax(dim=1) - _HALF_STEP).clamp_min(0)
    relative = difference / scaled.abs().amax(dim=1)
    return math.inf if relative.isnan().any() else float(relative.max())


@contextmanager
def _layers_in_order(model: nn.Module) -> Iterator[list[Any]]:
    """The convolutions and linear layers in the order in which a forward pass calls them."""
    layers: list[Any] = []
    handles = [
        module.register_forward_hook(lambda layer, *_: layers.append(layer))
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _native(path: Path, spec: ExportSpec, reference: Reference, tolerance: float) -> Parity:
    probabilities = runtime(path, spec)(reference.images)
    return compare(reference.logits.softmax(dim=1), probabilities, "probabilities", tolerance)
