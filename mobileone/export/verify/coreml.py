"""Is a written `.mlpackage` the trained network? The file itself is asked, on any machine."""

import copy
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mobileone.export.formats.coreml import columns, runtime
from mobileone.export.preprocess import WithPreprocessing, normalize
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.layers import layers_in_order
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.parity import (
    NotVerifiedError,
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
        reference: the network, its outputs, and the images.
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

    program = cache(MLProgram)

    def logits(images: Tensor, rounding: bool) -> Tensor:
        answer = program(path).predict(images, rounding=rounding)
        return answer.logits[:, columns(answer, spec)]

    def exact() -> Parity:
        # the synthetic images have colors: gray ones cannot show RGB for BGR
        images = torch.cat([reference.images, fixed_images(spec, 2)])
        expected = _rounded_logits(spec, reference.model, images, precision)
        return compare(expected, logits(images, False), "logits", program_tolerance)

    def native() -> Parity:
        expected = reference.logits.softmax(dim=1)
        return compare(expected, runtime(path, spec)(reference.images), "probabilities", tolerance)

    checks = {
        "parity": lambda: compare(
            reference.logits, logits(reference.images, True), "logits", tolerance
        ),
        "program_parity": exact,
        "weights_parity": lambda: _weights_parity(program(path), spec, reference, precision),
    }
    if sys.platform == "darwin":
        checks["runtime_parity"] = native
    return {name: measure(run) for name, run in checks.items()}


@torch.no_grad()
def _rounded_logits(
    spec: ExportSpec, fused: nn.Module, images: Tensor, precision: torch.dtype
) -> Tensor:
    """Logits of the fused network, in float32, with weights that went through `precision`."""
    network = WithPreprocessing(copy.deepcopy(fused), spec)
    return network.to(precision).float().logits(images.float())


# Of each weight by itself. Bit for bit is the rule; where a converter folds a scale that follows
# into the weights, three roundings to half precision (of the weight, their product, the scale)
# remain.
TOLERANCE = 3 * 2**-11


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def _weights_parity(
    program: MLProgram, spec: ExportSpec, reference: Reference, precision: torch.dtype
) -> Parity:
    """The largest relative error of a single weight or bias; an image shows the layers' order.

    Raises:
        NotVerifiedError: the layers are not the network's, so that they cannot be matched.
    """
    written = [_Layer(*layer) for layer in program.layers()]
    with layers_in_order(reference.model) as modules:
        reference.model(normalize(reference.images[:1], spec))
    own = [_Layer(module.weight, module.bias) for module in modules]
    if Counter(w.weight.shape for w in written) != Counter(o.weight.shape for o in own):
        raise NotVerifiedError("the converter has rearranged the layers")
    errors = [  # parallel layers may be in another order
        min(_error(w, o, precision) for o in own if w.weight.shape == o.weight.shape)
        for w in written
    ]
    worst = max(errors, default=0.0)
    return Parity("measured", kind="weights", max_relative_error=worst, tolerance=TOLERANCE)


def _error(written: _Layer, own: _Layer, precision: torch.dtype) -> float:
    rounded = own.weight.to(precision).float()
    if torch.equal(written.weight, rounded):
        return _bias_error(written.bias, own.bias, precision)
    return _up_to_channel_scales(written.weight.flatten(1), own.weight.flatten(1), precision)


def _bias_error(written: Tensor | None, own: Tensor | None, precision: torch.dtype) -> float:
    if written is None or own is None:  # none is as good as zeros
        given = written if own is None else own
        return 0.0 if given is None or not given.any() else float("inf")
    return _relative(written, own.to(precision).float(), precision)


def _up_to_channel_scales(written: Tensor, own: Tensor, precision: torch.dtype) -> float:
    """A converter may fold a scale that follows into the weights: one factor an output channel.

    The median of the ratios is that factor, whichever weight is wrong.
    """
    ratios = torch.where(own == 0, torch.nan, written / own)
    scale = ratios.nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0)
    return _relative(written, scale * own, precision)


def _relative(written: Tensor, expected: Tensor, precision: torch.dtype) -> float:
    """The largest error of a single value, less one step of the smallest numbers."""
    kind = torch.finfo(precision)
    step = kind.smallest_normal * kind.eps
    error = ((written - expected).abs() - step).clamp_min(0) / expected.abs().clamp_min(step)
    return float(error.nan_to_num(nan=torch.inf).max())
