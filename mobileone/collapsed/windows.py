"""Windows of a convolution as columns of matrices, and their mean and covariance."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mobileone.collapsed.algebra import WindowStatistics
from mobileone.collapsed.branches import Geometry

__all__ = [
    "algebra_dtype",
    "columns",
    "far_means",
    "image",
    "measured_variances",
    "rows",
    "uncolumns",
    "window_statistics",
]

_NARROW = 128
"""Pixels an image below which the images of a batch are joined: a matrix product of a few dozen
columns reaches a fifth of the speed of a wide one (49 columns: 15 of 90 GFMA/s)."""

_LIGHT = 64
"""Window size J up to which the small algebra is done in float64, where its cost cannot show."""

_FAR = 16.0
"""Ratio of squared mean to variance from which the moments are taken about the mean."""

_THIN = 64.0
"""Variances below one part in this of what the weights could make of the input are measured."""


def algebra_dtype(window: int, dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and small algebra for windows of J inputs of the given dtype."""
    return torch.float64 if window <= _LIGHT else torch.promote_types(dtype, torch.float32)


def columns(x: Tensor, geometry: Geometry) -> Tensor:
    """Windows of an input (N, C_in, H, W) as matrices (M, G, J, L), one window a column.

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
    return unfolded.view(batch, geometry.groups, geometry.window, -1)


def uncolumns(matrix: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
    """The adjoint of `columns`: sum (M, G, J, L) into an image of the given shape."""
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
    """Outputs (M, G, O, L), one pixel a column, as an image (N, G · O, H', W')."""
    if len(matrix) == shape[0]:
        return matrix.reshape(shape)
    joined = matrix.reshape(shape[1], shape[0], shape[2], shape[3])
    return joined.transpose(0, 1).contiguous()


def rows(y: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `image`: (N, C_out, H', W') to (M, G, O, L)."""
    batch, channels = y.shape[:2]
    if geometry.pointwise and _joined(y.shape[2:].numel(), batch):
        return y.transpose(0, 1).reshape(1, 1, channels, -1)
    return y.reshape(batch, geometry.groups, channels // geometry.groups, -1)


def window_statistics(matrix: Tensor) -> tuple[WindowStatistics, Tensor | None]:
    """Mean and covariance of the columns of (M, G, J, L), in float32 or better.

    Where the mean outweighs the spread, the moments are those of the columns less a constant
    shift (G, J), which is returned as well; where the squares overflow, they are in float64.
    """
    stats = _moments(matrix)
    variance = stats.cov.diagonal(dim1=-2, dim2=-1)
    # reads two small tensors; a GPU is waited for
    if bool((stats.mean.square() <= _FAR * variance).all()):
        return stats, None
    if not bool(torch.isfinite(stats.cov).all()):
        stats = _moments(matrix.double())
    shift = stats.mean.to(matrix.dtype)
    centred = _moments(matrix.double() - shift[..., None].double())
    dtype = algebra_dtype(matrix.shape[2], matrix.dtype)
    return WindowStatistics(centred.mean.to(dtype), centred.cov.to(dtype), centred.number), shift


def far_means(mean: Tensor, var: Tensor) -> Tensor:
    """The means that outweigh the spread, in float32, and 0 for the others."""
    return torch.where(mean.square() <= _FAR * var, 0.0, mean).float()


def _moments(matrix: Tensor) -> WindowStatistics:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    dtype = algebra_dtype(matrix.shape[2], matrix.dtype)
    count = wide.shape[0] * wide.shape[3]
    mean = wide.sum(-1).sum(0, dtype=dtype).div_(count)  # (G, J)
    gram = _gram(wide, dtype).div_(count)
    return WindowStatistics(mean, gram - mean[..., :, None] * mean[..., None, :], count)


def _gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ X Xᵀ of (M, G, J, L) as (G, J, J); of two symmetric quarters one is computed."""
    half = matrix.shape[2] // 2
    first, second = matrix[:, :, :half], matrix[:, :, half:]
    upper = torch.matmul(first, matrix.transpose(-1, -2)).sum(0, dtype=dtype)
    corner = torch.matmul(second, second.transpose(-1, -2)).sum(0, dtype=dtype)
    lower = torch.cat((upper[..., half:].transpose(-1, -2), corner), dim=-1)
    return torch.cat((upper, lower), dim=-2)


def measured_variances(var: Tensor, kernels: Tensor, cov: Tensor, windows: Tensor) -> Tensor:
    """Replace the variances that W C Wᵀ gives only roughly by those of the outputs themselves.

    Rounding in C reaches v magnified by Σⱼ Wⱼ² Cⱼⱼ / v. Rows in which that is large, because the
    branch looks where the input hardly varies, are convolved and measured: a few of them at most.

    Args:
        var: vᵢ of the branches (B or B + 1, G, O), the skip last.
        kernels: Wᵢ, (B, G, O, J).
        cov: C, (G, J, J).
        windows: The columns, (M, G, J, L).
    """
    if kernels.shape[1] > 1 or windows.dtype == torch.float64:
        return var
    size = torch.matmul(kernels.square(), cov.diagonal(dim1=-2, dim2=-1)[..., None]).squeeze(-1)
    poor = var[: len(kernels)] * _THIN < size
    if not bool(poor.any()):
        return var
    outputs = torch.matmul(kernels[poor].to(windows.dtype), windows[:, 0])  # (M, rows, L)
    var = var.clone()
    var[: len(kernels)][poor] = torch.var(outputs.double(), (0, 2), correction=0).to(var.dtype)
    return var


def _joined(pixels: int, batch: int) -> bool:
    return pixels < _NARROW and batch > 1
