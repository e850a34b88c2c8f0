"""Collapsed training of a pointwise block with one branch: the product, then one affine pass.

With a single convolution branch z = W x the Gram matrix costs more than it saves. Here the block is
y = a z + c x + b from the statistics of z (and of x, where there is a skip), and no BatchNorm
output is ever written; the backward pass has BatchNorm's gradient in closed form.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.branches import Geometry

__all__ = ["backward", "empty_outputs", "forward"]


class _Norm(NamedTuple):
    """One BatchNorm on its batch: a (z − μ) + β, all (C,) in float64."""

    mean: Tensor
    var: Tensor
    inverse: Tensor  # 1 / sqrt(v + ε)
    scale: Tensor  # a


def forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
    relu: bool,
    dtype: torch.dtype,
    inward: bool,
) -> list[Tensor]:
    """As `functions.Form`; keeps z = W x and the BatchNorms' statistics."""
    kernel, gamma, beta = _split(tensors)
    x = x.contiguous()
    z = F.conv2d(x, _in_rows(kernel))
    norms = [_normalize(z, gamma[0], geometry.eps[0])]
    if geometry.skip:
        norms.append(_normalize(x, gamma[1], geometry.eps[1]))
    bias = torch.stack([b - norm.scale * norm.mean for b, norm in zip(beta, norms, strict=True)])
    skip, skip_scale = (x, norms[1].scale.to(z.dtype)) if geometry.skip else (None, None)
    y = _affine(z, skip, norms[0].scale.to(z.dtype), skip_scale, bias.sum(0).to(z.dtype), relu)
    columns = [torch.stack(column)[:, None] for column in zip(*norms, strict=True)]
    return [y, columns[0], columns[1], z, *columns[2:]]


def empty_outputs(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> list[Tensor]:
    """What `forward` returns, without the values."""
    image = x.new_empty((len(x), geometry.out_chs, *x.shape[2:]))
    norms = (geometry.norms, 1, geometry.out_chs)
    statistics = [image.new_empty(norms, dtype=torch.float64) for _ in range(4)]
    return [image, *statistics[:2], torch.empty_like(image), *statistics[2:]]


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
    mean, var, z, inverse, scale = kept
    norms = [
        _Norm(*row) for row in zip(*(c[:, 0] for c in (mean, var, inverse, scale)), strict=True)
    ]
    x, g, kernel = x.contiguous(), g.contiguous(), _in_rows(tensors[0])
    skip, skip_mean = (x, norms[1].mean.to(z.dtype)) if geometry.skip else (None, None)
    sums = _gradient_sums(g, y, z, skip, norms[0].mean.to(z.dtype), skip_mean)
    n = z.numel() // z.shape[1]

    to_product = _coefficients(norms[0], sums[0], sums[1], n, z.dtype)
    dz = _affine_grad(g, y, z, *to_product, None)
    dx, dkernel, _ = torch.ops.aten.convolution_backward(
        dz, x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [inward, True, False]
    )
    if dx is not None and geometry.skip:
        to_skip = _coefficients(norms[1], sums[0], sums[2], n, x.dtype)
        dx = _affine_grad(g, y, x, *to_skip, dx)
    dbeta = sums[0].to(kernel.dtype)
    dgamma = [(sums[1 + i] * norm.inverse).to(kernel.dtype) for i, norm in enumerate(norms)]
    dbetas = [dbeta.clone() for _ in norms]
    return [x.new_empty(0) if dx is None else dx, dkernel, *dgamma, *dbetas]


def _split(tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
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
