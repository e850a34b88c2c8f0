"""Patches of a convolution as columns of matrices, and their mean and covariance."""

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.algebra import PatchStatistics
from mobileone.collapsed.branches import Geometry

__all__ = [
    "Float64Level",
    "algebra_dtype",
    "col2im",
    "im2col",
    "image",
    "mean_dominates",
    "patch_statistics",
    "required_precision",
    "rows",
]

_NARROW = 128
"""Pixels an image below which the images of a batch are joined: a matrix product of a few dozen
columns reaches a fifth of the speed of a wide one (49 columns: 15 of 90 GFMA/s)."""

_LIGHT = 128
"""Patch size J up to which the small algebra is done in float64, where its cost cannot show."""

_FAR = 16.0
"""Ratio of squared mean to variance from which products with patches are taken about the mean."""

_THIN = 4.0
"""Ratio of what the weights could make of the input's variance to what a branch does make of it
from which the small algebra is done in float64."""

_ROUGH = 32.0
"""The same from which Ŵ x is, as the rounding of Ŵ shows: branches normalize theirs away."""

_THINNEST = 8.0
"""The same from which sums over patches are taken in float64 as well, if there are few of them."""

_PRECISE = 1 / 3
"""And part of √n that is allowed instead, if that is more: the error of C falls with √n."""

_ALIKE = 0.25
"""Part of the patches' variance that a branch's output must leave unexplained for an input gradient
in float32."""


class Float64Level(IntEnum):
    """What runs in float64."""

    NONE = 0
    ALGEBRA = 1
    PRODUCT = 2  # and the algebra
    SUMS = 3  # and all of these


def algebra_dtype(geometry: Geometry, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the small algebra for inputs of the given dtype, where no care is needed.

    Of a single branch, the gradient may cancel altogether.
    """
    light = geometry.patch <= _LIGHT or geometry.branches == 1
    return torch.float64 if light else torch.promote_types(dtype, torch.float32)


def im2col(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches of an input (N, C_in, H, W) as matrices (M, G, J, L), one patch a column.

    M is N, or 1 where small images of a pointwise block are joined: L is then N · H · W.
    """
    batch, channels = x.shape[:2]
    if geometry.pointwise:
        if _joined(x.shape[2:].numel(), batch):
            return x.transpose(0, 1).reshape(1, 1, channels, -1)
        return x.reshape(batch, 1, channels, -1)
    unfolded = F.unfold(
        x, geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride
    )  # (N, C_in · K², L)
    return unfolded.view(batch, geometry.groups, geometry.patch, -1)


def col2im(matrix: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
    """The adjoint of `im2col`: sum (M, G, J, L) into an image of the given shape."""
    if geometry.pointwise:
        return image(matrix, shape)
    return F.fold(
        matrix.flatten(1, 2),
        shape[2:],
        geometry.kernel_size,
        geometry.dilation,
        geometry.padding,
        geometry.stride,
    )


def image(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Outputs (M, G, O, L), one pixel a column, as an image (N, G · O, H', W').

    No view for autograd, so that what a block returns may be changed in place.
    """
    if len(matrix) == shape[0]:
        return torch.ops.aten._unsafe_view(matrix, shape)
    joined = matrix.reshape(shape[1], shape[0], shape[2], shape[3])
    return joined.transpose(0, 1).contiguous()


def rows(y: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `image`: (N, C_out, H', W') to (M, G, O, L)."""
    batch, channels = y.shape[:2]
    if geometry.pointwise and _joined(y.shape[2:].numel(), batch):
        return y.transpose(0, 1).reshape(1, 1, channels, -1)
    return y.reshape(batch, geometry.groups, channels // geometry.groups, -1)


def patch_statistics(x: Tensor, geometry: Geometry) -> tuple[PatchStatistics, Tensor]:
    """Mean and covariance of the patches of x (N, C_in, H, W), and the shift (G, J) of the sums.

    Nothing depends on the shift but rounding, which would grow with mean² / variance. It is near
    the mean and has ten bits, so that differences from it, and their products where a value is
    frequent, are exact: low bits would be rounded away alike in all of them. Mean and covariance
    are in float64, the shift is in the dtype of the sums, float32 or better.
    """
    if native.fits(x):
        shift, gram, total = native.gram_moments(x, geometry)
    else:
        shift, gram, total = _gram(im2col(x, geometry))
    count = geometry.patches(x)
    rest = total / count  # of the mean, (G, J)
    cov = gram.div_(count) - rest[..., :, None] * rest[..., None, :]
    return PatchStatistics(rest + shift, cov, count), shift


def required_precision(
    stats: PatchStatistics, size: Tensor, explained: Tensor, var: Tensor, inward: bool
) -> Float64Level:
    """Whether rounding would be magnified in what is made of the patches.

    That is so where squares overflow; where vᵢ is far below what the weights could make of it,
    Σⱼ Wᵢⱼ² Cⱼⱼ; and, in ∂L/∂x, where one direction has most of the patches' variance:
    BatchNorm's gradient ignores the direction in which a branch looks, so that what counts is the
    variance that zᵢ = Wᵢ x leaves unexplained, tr C − |C Wᵢ|² / vᵢ.

    Args:
        stats: Of the patches, summed in their own dtype.
        size: Σⱼ Wᵢⱼ² Cⱼⱼ of the convolution branches, (B, G, O).
        explained: |C Wᵢ|², likewise.
        var: vᵢ of every branch, the skip last, (B or B + 1, G, O).
        inward: Whether ∂L/∂x will be wanted.
    """
    var = var[: len(size)]
    thinnest = max(_THINNEST, _PRECISE * stats.number**0.5)
    worst = (var * thinnest < size).any() | ~stats.cov.isfinite().all()
    if inward:
        total = stats.cov.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None]
        worst |= (explained > (1 - _ALIKE) * total * var).any()
    # the only look at the numbers: a GPU is waited for
    levels = (var * _THIN < size).any(), (var * _ROUGH < size).any(), worst
    return Float64Level(
        int(torch.stack([n * level.int() for n, level in enumerate(levels, 1)]).max())
    )


def mean_dominates(stats: PatchStatistics) -> bool:
    """Whether a mean outweighs the spread, so that products with the patches would cancel."""
    variance = stats.cov.diagonal(dim1=-2, dim2=-1)
    return bool((stats.mean.square() > _FAR * variance).any())


def _gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A shift (G, J), Σ X Xᵀ (G, J, J) and Σ X (G, J) of X, a matrix (M, G, J, L) less the shift.

    The sums are in float64.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    average = wide.sum(-1).sum(0, dtype=torch.float64) / (wide.shape[0] * wide.shape[3])
    fraction, exponent = torch.frexp(average)
    shift = torch.ldexp(torch.round(fraction * 1024) / 1024, exponent)
    shift = torch.nan_to_num(shift.to(wide.dtype))
    wide = wide - shift[..., None]
    half = wide.shape[2] // 2  # of two symmetric quarters one is computed
    first, second = wide[:, :, :half], wide[:, :, half:]
    upper = torch.matmul(first, wide.mT).sum(0, dtype=torch.float64)
    corner = torch.matmul(second, second.mT).sum(0, dtype=torch.float64)
    lower = torch.cat((upper[..., half:].mT, corner), dim=-1)
    return shift, torch.cat((upper, lower), dim=-2), wide.sum(-1).sum(0, dtype=torch.float64)


def _joined(pixels: int, batch: int) -> bool:
    return pixels < _NARROW and batch > 1
