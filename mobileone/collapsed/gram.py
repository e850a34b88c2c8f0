"""Collapsed training of any block on the Gram matrix of its patches, in tensor operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mobileone.collapsed.algebra import (
    Branches,
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
    row_products,
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
    patches = im2col(x, geometry)
    stats, shift = patch_statistics(patches)
    algebra = algebra_dtype(geometry, x.dtype)
    branches, cov, product = _products(geometry, tensors, stats, algebra)
    var = branch_variances(branches, cov, product)
    level = required_precision(stats, branches.kernels, product, var[: geometry.branches], inward)
    if level is Float64Level.SUMS:
        stats, _ = patch_statistics(patches.double())
    if level:
        branches, cov, product = _products(geometry, tensors, stats, torch.float64)
        var = branch_variances(branches, cov, product)
    far = level is Float64Level.SUMS or mean_dominates(stats)
    folded = collapse(branches, stats.mean - shift if far else stats.mean, var)
    # under autocast the product is as narrow as the branches' own, whatever precision is needed
    careful = level >= Float64Level.PRODUCT and dtype == tensors[0].dtype
    y = _product(folded, patches, shift if far else None, torch.float64 if careful else dtype)
    y = y.to(dtype)
    if relu:
        y.relu_()
    size = geometry.output_size(*x.shape[2:])
    y = image(y, torch.Size((x.shape[0], geometry.out_chs, *size)))
    mean = branch_means(branches, stats.mean)
    how = torch.tensor([level, far], device="cpu")
    kept = [stats.mean, cov, folded.weight, folded.bias, folded.scale]
    return [y, mean, var.double(), how, shift, *kept]


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
    cov, weight, bias, scale = (tensor.to(algebra) for tensor in rest)
    folded = Collapsed(weight, bias, var.to(algebra), scale)
    if y is not None:
        g = torch.ops.aten.threshold_backward(g, y, 0)
    # narrow gradients would lose P in cancellation, and S, of order 1/n, underflows in float16
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    g, total, rest_of_sum = _center(wide, in_place=y is not None or wide is not g)
    patches, g, rest_of_sum = im2col(x, geometry), rows(g, geometry), rest_of_sum.view(len(m), -1)
    patches = patches.to(torch.promote_types(x.dtype, torch.float32))
    left, right = (g.double(), patches.double()) if level == Float64Level.SUMS else (g, patches)
    weight_grad = row_products(left, right, shift.to(right.dtype))
    weight_grad -= rest_of_sum[..., None] * (m - shift)[:, None, :]  # about the mean, (G, O, J)
    branches = gather_branches(geometry, tensors, cov.dtype)
    if far:
        right, m = right - shift[..., None], m - shift
    stats = PatchStatistics(m, cov, geometry.patches(x))
    grads = branch_backward(weight_grad.to(cov.dtype), rest_of_sum, branches, stats, folded)
    grads = grads._replace(beta=total.view_as(rest_of_sum))
    dx = x.new_empty(0)
    if inward:
        dtype = left.dtype
        dpatches = torch.matmul(folded.weight.to(dtype).mT, left)
        _add_product(dpatches, grads.slope.to(dtype), right.to(dtype))
        dpatches += grads.offset.to(dtype)[..., None]
        dx = col2im(dpatches, geometry, x.shape).to(x.dtype)
    return [dx, *branch_gradients(geometry, grads, tensors)]


def _product(
    folded: Collapsed, patches: Tensor, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Ŵ x + b̂, (M, G, O, L), in the given dtype; of patches (M, G, J, L) less a shift (G, J)."""
    if shift is not None:
        patches = patches.to(torch.promote_types(patches.dtype, dtype)) - shift[..., None]
    y = torch.matmul(folded.weight.to(dtype), patches.to(dtype))
    y += folded.bias.to(dtype)[..., None]
    return y


def _products(
    geometry: Geometry,
    tensors: Sequence[Tensor],
    stats: PatchStatistics,
    dtype: torch.dtype,
) -> tuple[Branches, Tensor, Tensor]:
    """The branches, C and Wᵢ C in the dtype of the algebra."""
    branches, cov = gather_branches(geometry, tensors, dtype), stats.cov.to(dtype)
    return branches, cov, torch.matmul(branches.kernels, cov)


def _center(g: Tensor, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """g − ḡ of g (N, C_out, H', W'), Σ g and Σ (g − ḡ), (C_out,) in float64.

    BatchNorm passes nothing of ḡ on but to β, and products with it would only cancel. What is
    left of the sum, since ḡ is rounded, is returned as well.
    """
    total = g.sum((2, 3)).sum(0, dtype=torch.float64)
    number = g.numel() // g.shape[1]
    average = (total / number).to(g.dtype)
    rest = total - number * average.double()
    difference = torch.sub(g, average[:, None, None], out=g if in_place else None)
    return difference, total, rest


def _add_product(total: Tensor, slope: Tensor, patches: Tensor) -> None:
    """Add S X to (M, G, J, L) in place."""
    batch = total.shape[0]
    slopes = slope.expand(batch, *slope.shape).flatten(0, 1)
    total.flatten(0, 1).baddbmm_(slopes, patches.flatten(0, 1))
