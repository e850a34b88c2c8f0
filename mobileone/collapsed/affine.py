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

from mobileone.collapsed import cpu_kernels as native
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
        y = _affine(z, skip, norms[0].scale.to(z.dtype), skip_scale, bias.to(z.dtype), relu)
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
        sums = _gradient_sums(g, y, z, skip, norms[0].mean.to(z.dtype), skip_mean)
        n = z.numel() // z.shape[1]

        to_product = _coefficients(norms[0], sums[0], sums[1], n, z.dtype)
        dz = _affine_grad(g, y, z, *to_product, None)
        wanted = [ctx.needs_input_grad[0], True, False]
        dx, dkernel, _ = torch.ops.aten.convolution_backward(
            dz, x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
        )
        if dx is not None and geometry.skip:
            to_skip = _coefficients(norms[1], sums[0], sums[2], n, x.dtype)
            dx = _affine_grad(g, y, x, *to_skip, dx)
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
    mean, var = _channel_moments(z)
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


# -- Passes over images, on the CPU kernels or in PyTorch ----------------------------------------


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C) and biased variance (C) of x (N, C, H, W) in float64, about the mean."""
    if native.fits(x):
        return native.channel_moments(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean, var


def _affine(
    z: Tensor, x: Tensor | None, a: Tensor, c: Tensor | None, b: Tensor, relu: bool
) -> Tensor:
    """y = a z + c x + b a channel, rectified on demand; a, b, c are (C), in z's dtype."""
    if native.fits(z):
        y = torch.empty_like(z)
        native.affine(z, x, a, c, b, relu, y)
        return y
    y = torch.addcmul(_per_channel(b), _per_channel(a), z)
    if x is not None and c is not None:
        y.addcmul_(_per_channel(c), x)
    return y.relu_() if relu else y


def _gradient_sums(
    g: Tensor, y: Tensor | None, z: Tensor, x: Tensor | None, mean_z: Tensor, mean_x: Tensor | None
) -> Tensor:
    """Σ g, Σ g (z − μ_z), Σ g (x − μ_x) a channel, (3, C) in float64.

    g counts where the rectifier let it through, y > 0; y is None where there is no rectifier.
    Without x the third row has no meaning.
    """
    if native.fits(z):
        return native.gradient_sums(g, y, z, x, mean_z, mean_x)
    passed = _passed(g, y)
    rows = [passed, passed * (z - _per_channel(mean_z))]
    rows.append(rows[1] if x is None or mean_x is None else passed * (x - _per_channel(mean_x)))
    return torch.stack([row.sum((0, 2, 3), dtype=torch.float64) for row in rows])


def _affine_grad(
    g: Tensor, y: Tensor | None, z: Tensor, a: Tensor, s: Tensor, r: Tensor, total: Tensor | None
) -> Tensor:
    """a g + s z + r a channel, added to `total` in place where given; g as in `gradient_sums`."""
    if native.fits(z):
        to = torch.empty_like(z) if total is None else total
        native.affine_grad(g, y, z, a, s, r, total is not None, to)
        return to
    value = torch.addcmul(_per_channel(r), _per_channel(a), _passed(g, y))
    value.addcmul_(_per_channel(s), z)
    return value if total is None else total.add_(value)


def _passed(g: Tensor, y: Tensor | None) -> Tensor:
    return g if y is None else torch.ops.aten.threshold_backward(g, y, 0)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]
