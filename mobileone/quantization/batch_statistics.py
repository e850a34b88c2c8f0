"""Folding on the statistics of a batch of rounded inputs, from their second moments.

RepQ (Prutianova et al., BMVC 2023) trains the rounded kernel of folded branches; with BatchNorm on
batch statistics it runs a second convolution, or estimates variances by a diagonal covariance.
Collapsed training has the exact covariance, so that one convolution does.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.algebra import branch_means, branch_variances, collapse
from mobileone.collapsed.branches import Geometry, gather_branches
from mobileone.collapsed.depthwise import has_kernels
from mobileone.collapsed.moments import algebra_dtype, col2im, im2col, patch_statistics
from mobileone.quantization.foldable import DEAD, Branch

__all__ = ["fold_on_batch"]


def fold_on_batch(
    x: Tensor, branches: list[Branch], conv: nn.Conv2d, noise: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Fold branches on the statistics of their outputs for x.

    Noise of variance n joins the diagonal of the covariance, as it joins the running variance
    elsewhere: rounding turns weak channels into zeros, of which the variance is 0 and the gain
    γ / sqrt(ε), until a channel shows itself.

    Args:
        x: Rounded input, (N, C_in, H, W).
        branches: The BatchNorm skip last, if there is one.
        conv: How the kernel walks.
        noise: n, a scalar.
        diagonal: Take inputs for uncorrelated (RepQ-BNEst).

    Returns:
        Kernel (C_out, C_in / groups, K, K) and bias (C_out,), differentiable; means and variances
        of the branches on x alone, (branches, C_out), and the number of values that they are of.
    """
    geometry = _geometry(branches, conv)
    dtype = algebra_dtype(geometry, x.dtype)
    mean, cov = _Moments.apply(x, geometry)
    cov = cov.to(dtype)
    if diagonal:
        cov = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
    kernels = [branch.kernel for branch in branches[: geometry.branches]]
    affine = [getattr(branch.norm, name) for name in ("weight", "bias") for branch in branches]
    rows = gather_branches(geometry, [*kernels, *affine], dtype)
    own = branch_variances(rows, cov, torch.matmul(rows.kernels, cov))
    energy = rows.kernels.square().sum(-1)
    if geometry.skip:
        energy = torch.cat((energy, torch.ones_like(energy[:1])))
    added = noise.to(dtype) * energy
    rows = replace(rows, gamma=rows.gamma * (own >= DEAD * added))
    folded = collapse(rows, mean, own + added)
    weight = folded.weight.to(x.dtype).reshape(conv.weight.shape)
    means = branch_means(rows, mean).flatten(1).detach()
    bias, var = folded.bias.flatten().to(x.dtype), own.flatten(1).detach()
    return weight, bias, means, var, _number(x, geometry)


def _geometry(branches: list[Branch], conv: nn.Conv2d) -> Geometry:
    skip = branches[-1].skip
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return Geometry(
        in_chs=conv.in_channels,
        out_chs=conv.out_channels,
        kernel_size=conv.kernel_size[0],
        stride=conv.stride[0],
        padding=padding,
        dilation=conv.dilation[0],
        groups=conv.groups,
        branches=len(branches) - skip,
        skip=skip,
        eps=tuple(branch.norm.eps for branch in branches),
    )


class _Moments(torch.autograd.Function):
    """Mean (G, J) and biased covariance (G, J, J) of the patches of x, in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        ctx.native = _has_kernels(x, geometry)
        if ctx.native:
            mean, cov = native.depthwise_moments(x, geometry.stride)
        else:
            (mean, cov, _), _ = patch_statistics(x, geometry)
        ctx.geometry = geometry
        ctx.save_for_backward(x, mean)
        return mean, cov

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor, dcov: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        number = _number(x, geometry)
        slope, shift = (dcov + dcov.mT) / number, mean.to(x.dtype)
        # of a patch: S (x − m) + ∂L/∂m / n
        if ctx.native:
            shift = shift[:, geometry.patch // 2].contiguous()  # one a channel
            offset = (
                dmean / number + torch.matmul(slope, (shift[:, None] - mean)[..., None])[..., 0]
            )
            none = x.new_zeros(*x.shape[:2], *geometry.output_size(*x.shape[2:]))
            weight = torch.zeros_like(mean)[:, None]
            numbers = weight, slope, offset, shift
            dx = native.depthwise_input_grad(none, None, x, geometry.stride, *numbers)
            return dx, None
        patches = im2col(x, geometry) - shift[..., None]
        dpatches = torch.matmul(slope.to(x.dtype), patches)
        dpatches += (dmean / number).to(x.dtype)[..., None]
        return col2im(dpatches, geometry, x.shape), None


def _number(x: Tensor, geometry: Geometry) -> int:
    return len(x) * torch.Size(geometry.output_size(*x.shape[2:])).numel()


def _has_kernels(x: Tensor, geometry: Geometry) -> bool:
    alike = (geometry.kernel_size, geometry.padding, geometry.dilation) == (3, 1, 1)
    return alike and geometry.depthwise and has_kernels(x, x.dtype, x.dtype)
