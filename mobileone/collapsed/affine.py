"""Collapsed training of a pointwise block with one branch: the product, then one affine pass.

With a single convolution branch z = W x the Gram matrix costs more than it saves. Here the block is
y = a z + c x + b from the statistics of z (and of x, where there is a skip), and no BatchNorm
output is ever written; the backward pass has BatchNorm's gradient in closed form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mobileone.collapsed import elementwise as passes
from mobileone.collapsed.branches import Geometry

__all__ = ["AffineConvolution"]


class _Norm(NamedTuple):
    """One BatchNorm on its batch: a (z − μ) + β, all (C,) in float64."""

    mean: Tensor
    var: Tensor
    inverse: Tensor  # 1 / sqrt(v + ε)
    scale: Tensor  # a


class AffineConvolution(torch.autograd.Function):
    """y = a (W x) + c x + b, rectified on demand; keeps x, z = W x and y (the next block's x).

    Called as `apply(x, geometry, relu, *parameters)`; returns what `GramConvolution` does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, geometry: Geometry, relu: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel, gamma, beta = _split(tensors)
        kernel = _in_rows(kernel)
        x = x.contiguous()
        z = F.conv2d(x, kernel)
        norms = [_normalize(z, gamma[0], geometry.eps[0])]
        if geometry.skip:
            norms.append(_normalize(x, gamma[1], geometry.eps[1]))
        bias = torch.stack(
            [b - norm.scale * norm.mean for b, norm in zip(beta, norms, strict=True)]
        ).sum(0)
        skip, skip_scale = (x, norms[1].scale.to(z.dtype)) if geometry.skip else (None, None)
        y = passes.affine(z, skip, norms[0].scale.to(z.dtype), skip_scale, bias.to(z.dtype), relu)
        ctx.geometry = geometry
        ctx.save_for_backward(x, z, y if relu else None, kernel, *gamma, *_flatten(norms))
        mean = torch.stack([norm.mean for norm in norms])
        var = torch.stack([norm.var for norm in norms])
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        geometry, g = ctx.geometry, g.contiguous()
        count = 1 + geometry.skip
        x, z, y, kernel, *rest = ctx.saved_tensors
        norms = [_Norm(*rest[count + 4 * i : count + 4 * i + 4]) for i in range(count)]
        skip, skip_mean = (x, norms[1].mean.to(z.dtype)) if geometry.skip else (None, None)
        sums = passes.gradient_sums(g, y, z, skip, norms[0].mean.to(z.dtype), skip_mean)
        n = z.numel() // z.shape[1]

        to_product = _coefficients(norms[0], sums[0], sums[1], n, z.dtype)
        dz = passes.affine_grad(g, y, z, *to_product, None)
        wanted = [ctx.needs_input_grad[0], True, False]
        dx, dkernel, _ = torch.ops.aten.convolution_backward(
            dz, x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
        )
        if dx is not None and geometry.skip:
            to_skip = _coefficients(norms[1], sums[0], sums[2], n, x.dtype)
            dx = passes.affine_grad(g, y, x, *to_skip, dx)
        dbeta = sums[0].to(kernel.dtype)
        dgamma = [(sums[1 + i] * norms[i].inverse).to(kernel.dtype) for i in range(count)]
        return dx, None, None, dkernel, *dgamma, *([dbeta] * count)


def _split(tensors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    norms = len(tensors) // 2
    return tensors[0], tensors[1 : 1 + norms], tensors[1 + norms :]


def _in_rows(kernel: Tensor) -> Tensor:
    """A 1×1 kernel with the strides of contiguous ones: in channels-last, outputs would be so."""
    return kernel.reshape(kernel.shape[:2])[..., None, None]


def _normalize(z: Tensor, gamma: Tensor, eps: float) -> _Norm:
    mean, var = passes.channel_moments(z)
    var.clamp_(min=0.0)
    inverse = (var + eps).rsqrt()
    return _Norm(mean, var, inverse, gamma * inverse)


def _flatten(norms: list[_Norm]) -> list[Tensor]:
    return [tensor for norm in norms for tensor in norm]


def _coefficients(
    norm: _Norm, total: Tensor, dot: Tensor, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's input gradient as a g + s z + r; `dot` is Σ g (z − μ)."""
    slope = -norm.scale * norm.inverse.square() * dot / n
    offset = -norm.scale * total / n - slope * norm.mean
    return norm.scale.to(dtype), slope.to(dtype), offset.to(dtype)
