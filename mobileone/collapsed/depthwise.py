"""Collapsed training of a depthwise 3×3 block on the CPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

__all__ = ["DepthwiseConvolution", "has_kernels"]


def has_kernels(x: Tensor, own: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether there are kernels for an input, parameters of dtype `own`, convolved in `dtype`."""
    # borders are taken off a plane from the inside: three rows and columns
    fits = x.device.type == "cpu" and x.dtype == dtype == own == torch.float32
    return fits and min(x.shape[2:]) > 2 and native.library() is not None


class DepthwiseConvolution(torch.autograd.Function):
    """y = Ŵ ∗ x + b̂ a channel, rectified on demand; keeps x, y (the next block's x), m and C.

    Called as `apply(x, geometry, relu, *parameters)`, on a CPU with a float32 input; returns what
    `GramConvolution` does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, geometry: Geometry, relu: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, stride = x.contiguous(), geometry.stride
        mean, cov = native.depthwise_moments(x, stride)
        height, width = geometry.output_size(*x.shape[2:])
        branches = gather_branches(geometry, tensors, cov.dtype)
        ill_conditioned = ill_conditioned_channels(mean, cov, branches.kernels)
        which = ill_conditioned.nonzero().squeeze(-1)
        if len(which):
            native.depthwise_careful_moments(x, stride, which, mean, cov)
        var = branch_variances(branches, cov, torch.matmul(branches.kernels, cov))
        shift = dominant_means(mean[:, 4], cov[:, 4, 4])  # of the center tap, (C,)
        folded = collapse(branches, mean - shift[:, None], var)
        y = native.depthwise_forward(x, stride, shift, folded.weight, folded.bias, relu)
        ctx.geometry, ctx.number = geometry, len(x) * height * width
        ctx.save_for_backward(x, y if relu else None, mean, cov, ill_conditioned, *folded, *tensors)
        branch_mean, branch_var = branch_means(branches, mean).flatten(1), folded.var.flatten(1)
        ctx.mark_non_differentiable(branch_mean, branch_var)
        return y, branch_mean, branch_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, m, cov, ill_conditioned, *rest = ctx.saved_tensors
        folded, tensors = Collapsed(*rest[:4]), rest[4:]
        geometry, g = ctx.geometry, g.contiguous()
        stride = geometry.stride
        shift = dominant_means(m[:, 4], cov[:, 4, 4])
        weight_grad, bias_grad = native.depthwise_weight_grad(g, y, x, stride, m, ill_conditioned)
        grads = branch_backward(
            weight_grad[:, None],
            bias_grad[:, None],
            gather_branches(geometry, tensors, cov.dtype),
            PatchStatistics(m - shift[:, None], cov, ctx.number),
            folded,
        )
        dx = None
        if ctx.needs_input_grad[0]:
            dx = native.depthwise_input_grad(
                g, y, x, stride, folded.weight, grads.slope, grads.offset, shift
            )
        return dx, None, None, *branch_gradients(geometry, grads, tensors)
