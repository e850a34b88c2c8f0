"""Collapsed training of any block on the Gram matrix of its patches."""

from collections.abc import Sequence
from typing import NamedTuple

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
from mobileone.collapsed.moments import (
    Float64Level,
    algebra_dtype,
    col2im,
    im2col,
    image,
    mean_dominates,
    patch_statistics,
    required_precision,
    rows,
)

__all__ = ["backward", "empty_outputs", "forward"]


def forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
    relu: bool,
    dtype: torch.dtype,
    inward: bool,
) -> list[Tensor]:
    """As `functions.Form`; keeps what ran in float64, the shift, m, C and the map.

    C and the map, of J² and O · J numbers a group, stay in the dtype of the algebra: as float64
    they would outweigh x where channels are many.
    """
    x = x.contiguous()
    stats, shift = patch_statistics(x, geometry)
    algebra, far = algebra_dtype(geometry, x.dtype), mean_dominates(stats)
    cov, folded = _fold(x, geometry, tensors, stats, shift if far else None, algebra)
    level = required_precision(stats, folded.size, folded.explained, folded.var, inward)
    if level is Float64Level.SUMS:
        (stats, _), far = patch_statistics(x.double(), geometry), True
    if level is Float64Level.SUMS or (level and algebra != torch.float64):
        cov, folded = _fold(x, geometry, tensors, stats, shift if far else None, torch.float64)
    # under autocast the product is as narrow as the branches' own, whatever precision is needed
    careful = level >= Float64Level.PRODUCT and dtype == tensors[0].dtype
    wide = torch.float64 if careful else dtype
    y = _product(folded, x, geometry, shift if far else None, wide, relu).to(dtype)
    how = torch.tensor([level, far], device="cpu")
    kept = [stats.mean, cov, folded.weight, folded.bias, folded.scale]
    return [y, folded.mean, folded.var, how, shift, *kept]


def empty_outputs(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> list[Tensor]:
    """What `forward` returns, without the values, as float64 where the dtype depends on them."""
    groups, outputs, patch = geometry.groups, geometry.out_chs // geometry.groups, geometry.patch
    size = geometry.output_size(*x.shape[2:])
    wide = x.new_empty((), dtype=torch.float64)
    norms = (geometry.norms, groups, outputs)
    return [
        x.new_empty((len(x), geometry.out_chs, *size), dtype=dtype),
        *(wide.new_empty(norms) for _ in range(2)),
        torch.empty(2, dtype=torch.int64, device="cpu"),
        x.new_empty((groups, patch), dtype=torch.promote_types(x.dtype, torch.float32)),
        wide.new_empty((groups, patch)),
        wide.new_empty((groups, patch, patch)),
        wide.new_empty((groups, outputs, patch)),
        wide.new_empty((groups, outputs)),
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
    _, var, how, shift, m, *rest = kept
    level, far = how.tolist()
    algebra = torch.float64 if level else algebra_dtype(geometry, x.dtype)
    cov, weight, _, scale = (tensor.to(algebra) for tensor in rest)
    sums = _gradient_sums(g, y, x.contiguous(), geometry, shift, level)
    means = m - shift, m - shift if far else m
    folded = cov, var, weight, scale
    grads, slope, offset = _branch_gradients(sums, geometry, tensors, means, folded)
    dx = x.new_empty(0)
    if inward:
        dpatches = _patch_gradient(sums, geometry, shift if far else None, weight, slope, offset)
        dx = col2im(dpatches, geometry, x.shape).to(x.dtype)
    return [dx, *grads]


class _Folded(NamedTuple):
    """A block on the moments of its patches.

    Attributes:
        mean: μᵢ of every branch, the skip last, (B or B + 1, G, O), in float64.
        var: vᵢ likewise.
        size: What the weights of a convolution branch could make of the variance, (B, G, O).
        explained: The part of the patches' variance that its output explains, likewise.
        weight: Ŵ (G, O, J), in the dtype of the algebra.
        bias: b̂ (G, O).
        scale: aᵢ, (B or B + 1, G, O).
    """

    mean: Tensor
    var: Tensor
    size: Tensor
    explained: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor


def _fold(
    x: Tensor,
    geometry: Geometry,
    tensors: Sequence[Tensor],
    stats: PatchStatistics,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, _Folded]:
    """C in the dtype of the algebra, and what the block is for patches less a shift."""
    mean, cov = stats.mean, stats.cov.to(dtype)
    moved = mean if shift is None else mean - shift
    if native.fits(x) and tensors[0].dtype == x.dtype:
        return cov, _Folded(*native.collapse(geometry, tensors, mean, moved, cov))
    branches = gather_branches(geometry, tensors, dtype)
    product = torch.matmul(branches.kernels, cov)
    var = branch_variances(branches, cov, product)
    variance = cov.diagonal(dim1=-2, dim2=-1)[..., None]
    size = torch.matmul(branches.kernels.square(), variance).squeeze(-1)
    folded = collapse(branches, moved, var)
    explained, means = product.square().sum(-1), branch_means(branches, mean)
    return cov, _Folded(
        means, var.double(), size, explained, folded.weight, folded.bias, folded.scale
    )


class _GradientSums(NamedTuple):
    """Sums of ∂L/∂y about a center, which is near its mean.

    BatchNorm passes nothing of the mean on but to β, and products with it would only cancel.

    Attributes:
        products: Σ (g − center)(x − shift)ᵀ, (G, O, J), in float64.
        rest: Σ (g − center), (G, O), in float64.
        total: Σ g, likewise.
        left: g, for the kernels in their layout (N, C_out, H', W'), else less the center as `rows`.
        y: The output where g is still to be rectified; for the kernels.
        center: (G, O); None where g is less it.
        right: x, for the kernels, or its patches as matrices.
        number: n.
    """

    products: Tensor
    rest: Tensor
    total: Tensor
    left: Tensor
    y: Tensor | None
    center: Tensor | None
    right: Tensor
    number: int


def _gradient_sums(
    g: Tensor, y: Tensor | None, x: Tensor, geometry: Geometry, shift: Tensor, level: Float64Level
) -> _GradientSums:
    number, groups = geometry.patches(x), geometry.groups
    if level < Float64Level.SUMS and native.fits(x) and g.dtype == x.dtype:
        g = g.contiguous()
        center, products, rest = native.gram_weight_grad(g, y, x, geometry, shift)
        total = rest + number * center.double()
        return _GradientSums(products, rest, total, g, y, center, x, number)
    if y is not None:
        g = torch.ops.aten.threshold_backward(g, y, 0)
    # narrow gradients would lose P in cancellation, and S, of order 1/n, underflows in float16
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    total = g.sum((2, 3)).sum(0, dtype=torch.float64)
    average = (total / number).to(g.dtype)
    rest = (total - number * average.double()).view(groups, -1)  # since the average is rounded
    left, right = rows(g - average[:, None, None], geometry), im2col(x, geometry)
    right = right.to(torch.promote_types(x.dtype, torch.float32))
    if level == Float64Level.SUMS:
        left, right = left.double(), right.double()
    products = torch.matmul(left, (right - shift[..., None]).mT).sum(0, dtype=torch.float64)
    return _GradientSums(products, rest, total.view_as(rest), left, None, None, right, number)


def _patch_gradient(
    sums: _GradientSums,
    geometry: Geometry,
    shift: Tensor | None,
    weight: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """What the patches receive, (M, G, J, L): Ŵᵀg + S x + r, of x less a shift."""
    dtype, right = sums.left.dtype, sums.right
    weight, slope, offset = (t.to(dtype) for t in (weight, slope, offset))
    if sums.center is not None:
        matrices = shift, weight, slope, offset
        return native.gram_input_grad(sums.left, sums.y, sums.center, right, geometry, *matrices)
    if shift is not None:
        right = right - shift[..., None]
    total = torch.matmul(weight.mT, sums.left)
    slopes = slope.expand(len(total), *slope.shape).flatten(0, 1)
    total.flatten(0, 1).baddbmm_(slopes, right.to(dtype).flatten(0, 1))
    return total.add_(offset[..., None])


def _branch_gradients(
    sums: _GradientSums,
    geometry: Geometry,
    tensors: Sequence[Tensor],
    means: tuple[Tensor, Tensor],
    folded: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradient of every parameter, S (G, J, J) and r (G, J).

    `means` are m less the shift of the sums, and less that of the patches; `folded` are C and then
    vᵢ, Ŵ and aᵢ.
    """
    number, (cov, var, weight, scale) = sums.number, folded
    if sums.center is not None and tensors[0].dtype == sums.right.dtype:
        parts = sums.products, sums.rest, sums.total
        return native.branch_gradients(geometry, tensors, number, parts, means, folded)
    weight_grad = sums.products - sums.rest[..., None] * means[0][:, None, :]  # about the mean
    stats = PatchStatistics(means[1], cov, number)
    collapsed = Collapsed(weight, sums.rest, var.to(cov.dtype), scale)
    branches = gather_branches(geometry, tensors, cov.dtype)
    grads = branch_backward(weight_grad.to(cov.dtype), sums.rest, branches, stats, collapsed)
    gradients = branch_gradients(geometry, grads._replace(beta=sums.total), tensors)
    return gradients, grads.slope, grads.offset


def _product(
    folded: _Folded,
    x: Tensor,
    geometry: Geometry,
    shift: Tensor | None,
    dtype: torch.dtype,
    relu: bool,
) -> Tensor:
    """Ŵ x + b̂, (N, C_out, H', W'), in the given dtype, from x less a shift (G, J); rectified."""
    weight, bias = folded.weight.to(dtype), folded.bias.to(dtype)
    if native.fits(x) and dtype == x.dtype:
        return native.gram_forward(x, geometry, shift, weight, bias, relu)
    patches = im2col(x, geometry)
    if shift is not None:
        patches = patches.to(torch.promote_types(patches.dtype, dtype)) - shift[..., None]
    y = torch.matmul(weight, patches.to(dtype)).add_(bias[..., None])
    size = geometry.output_size(*x.shape[2:])
    return image(y.relu_() if relu else y, torch.Size((len(x), geometry.out_chs, *size)))
