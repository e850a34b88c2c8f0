"""Is each weight in an `.mlpackage` the network's? Asked of the weight file itself.

One behind a ReLU that is never open changes no answer, so that comparing answers cannot see it.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mobileone.export.preprocess import normalise
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.layers import layers_in_order
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.parity import NotVerifiedError, Parity, Reference

__all__ = ["weights_parity"]

# Of each weight by itself. Bit for bit is the rule; where a converter folds a scale that follows
# into the weights, three roundings to half precision (of the weight, their product, the scale)
# remain.
TOLERANCE = 3 * 2**-11


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def weights_parity(
    path: Path, spec: ExportSpec, reference: Reference, precision: torch.dtype
) -> Parity:
    """The largest relative error of a single weight or bias.

    Args:
        path: the `.mlpackage`.
        spec: what the network expects.
        reference: the network that was written, and an image to see the order of its layers.
        precision: in which the package states its weights.

    Raises:
        NotVerifiedError: the layers are not the network's, so that they cannot be told apart.
    """
    written = [_Layer(*layer) for layer in MLProgram(path).layers()]
    with layers_in_order(reference.model) as modules:
        reference.model(normalise(reference.images[:1], spec))
    own = [_Layer(module.weight, module.bias) for module in modules]
    if Counter(w.weight.shape for w in written) != Counter(o.weight.shape for o in own):
        raise NotVerifiedError("the converter has rearranged the layers")
    errors = [  # parallel layers may stand in another order
        min(_error(layer, other, precision) for other in own if _alike(layer, other))
        for layer in written
    ]
    worst = max(errors, default=0.0)
    return Parity("measured", kind="weights", max_relative_error=worst, tolerance=TOLERANCE)


def _alike(written: _Layer, own: _Layer) -> bool:
    return written.weight.shape == own.weight.shape


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
    """The largest error of a single value, but for a step of the smallest numbers there are."""
    kind = torch.finfo(precision)
    step = kind.smallest_normal * kind.eps
    error = ((written - expected).abs() - step).clamp_min(0) / expected.abs().clamp_min(step)
    return float(error.nan_to_num(nan=torch.inf).max())
