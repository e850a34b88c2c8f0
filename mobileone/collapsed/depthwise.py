"""Collapsed training of a depthwise 3×3 block on the CPU kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.branches import Geometry

__all__ = ["backward", "empty_outputs", "forward", "has_kernels"]


def has_kernels(x: Tensor, own: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether there are kernels for an input, parameters of dtype `own`, convolved in `dtype`."""
    # borders are taken off a plane from the inside: three rows and columns
    fits = x.device.type == "cpu" and x.dtype == dtype == own == torch.float32
    return fits and min(x.shape[2:]) > 2 and native.available()


def forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
    relu: bool,
    dtype: torch.dtype,
    inward: bool,
) -> list[Tensor]:
    """As `functions.Form`, on a CPU with a float32 input; keeps m, C and what ran in float64."""
    return native.depthwise_forward(x.contiguous(), geometry, tensors, relu)


def empty_outputs(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> list[Tensor]:
    """What `forward` returns, without the values."""
    channels, norms = geometry.out_chs, (geometry.norms, geometry.out_chs, 1)
    wide = x.new_empty((), dtype=torch.float64)
    return [
        x.new_empty((len(x), channels, *geometry.output_size(*x.shape[2:]))),
        *(wide.new_empty(norms) for _ in range(2)),
        wide.new_empty((channels, 9)),
        wide.new_empty((channels, 9, 9)),
        x.new_empty(channels, dtype=torch.bool),
    ]


def backward(
    g: Tensor,
    x: Tensor,
    y: Tensor | None,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    geometry: Geometry,
    inward: bool,
) -> list[Tensor]:
    """As `functions.Form`."""
    _, *statistics = kept
    x, g = x.contiguous(), g.contiguous()
    return native.depthwise_backward(g, y, x, geometry, tensors, statistics, inward)
