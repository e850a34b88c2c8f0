"""Is a written `.mlpackage` the trained network? The file itself is asked, on any machine."""

import copy
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.export.coreml_weights import weights_parity
from mobileone.export.formats.coreml import columns, runtime
from mobileone.export.preprocess import WithPreprocessing
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.parity import (
    Parity,
    Reference,
    compare,
    fixed_images,
    measure,
)

__all__ = ["check"]


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
        `weights_parity`: each weight in the file against the fused network's, by itself.
        `runtime_parity`, on macOS: Core ML itself, by probabilities.

    Raises:
        ValueError: the package's labels or input are not the spec's.
    """
    return {
        "parity": measure(partial(_stated, path, spec, reference, tolerance)),
        "program_parity": measure(
            partial(_exact, path, spec, reference, precision, program_tolerance)
        ),
        "weights_parity": measure(partial(weights_parity, path, spec, reference, precision)),
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


def _native(path: Path, spec: ExportSpec, reference: Reference, tolerance: float) -> Parity:
    probabilities = runtime(path, spec)(reference.images)
    return compare(reference.logits.softmax(dim=1), probabilities, "probabilities", tolerance)
