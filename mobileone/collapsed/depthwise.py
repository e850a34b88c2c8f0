"""Collapsed training of a depthwise 3×3 block on the CPU kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.algebra import (
    Collapsed,
    PatchStatistics,
    branch_backward,
    branch_means,
    branch_variances,
    collapse,
)
from mobileone.collapsed.branches import Geometry, branch_gradients, gather_branches
from mobileone.collapsed.moments import dominant_means, ill_conditioned_channels

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
    """As `functions.Form`, on a CPU with a float32 input; keeps m, C and the map."""
    x, stride = x.contiguous(), geometry.stride
    mean, cov = native.depthwise_moments(x, stride)
    branches = gather_branches(geometry, tensors, cov.dtype)
    ill_conditioned = ill_conditioned_channels(mean, cov, branches.kernels)
    which = ill_conditioned.nonzero().squeeze(-1)
    if len(which):
        native.depthwise_careful_moments(x, stride, which, mean, cov)
    var = branch_variances(branches, cov, torch.matmul(branches.kernels, cov))
    shift = dominant_means(mean[:, 4], cov[:, 4, 4])  # of the center tap, (C,)
    folded = collapse(branches, mean - shift[:, None], var)
    y = native.depthwise_forward(x, stride, shift, folded.weight, folded.bias, relu)
    kept = [mean, cov, ill_conditioned, folded.weight, folded.bias, folded.scale]
    return [y, branch_means(branches, mean), var, *kept]


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
        wide.new_empty((channels, 1, 9)),
        wide.new_empty((channels, 1)),
        wide.new_empty(norms),
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
    _, var, m, cov, ill_conditioned, weight, bias, scale = kept
    folded = Collapsed(weight, bias, var, scale)
    stride, x, g = geometry.stride, x.contiguous(), g.contiguous()
    shift = dominant_means(m[:, 4], cov[:, 4, 4])
    weight_grad, bias_grad = native.depthwise_weight_grad(g, y, x, stride, m, ill_conditioned)
    grads = branch_backward(
        weight_grad[:, None],
        bias_grad[:, None],
        gather_branches(geometry, tensors, cov.dtype),
        PatchStatistics(m - shift[:, None], cov, geometry.patches(x)),
        folded,
    )
    dx = x.new_empty(0)
    if inward:
        dx = native.depthwise_input_grad(
            g, y, x, stride, folded.weight, grads.slope, grads.offset, shift
        )
    return [dx, *branch_gradients(geometry, grads, tensors)]
