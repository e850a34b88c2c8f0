"""Collapsed training of any block by one convolution and one BatchNorm for all branches: for GPUs.

The statistics come from the branches' outputs, so that they are as accurate as the branches' own on
every input, and nothing depends on a number that the device would have to be asked for. The outputs
are dropped at once and computed again in the backward pass. Plain operations, which compilers and
CUDA graphs take whole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobileone.collapsed.branches import Geometry
from mobileone.folding import at_least_float32, center_pad, identity_kernel

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
    relu: bool,
    dtype: torch.dtype,
    inward: bool,
) -> list[Tensor]:
    """As `functions.Form`; keeps the kernels in `dtype`, γ, and the branches' statistics."""
    kernels, gamma, beta = _stack(geometry, tensors)
    kernels = kernels.to(dtype)
    z = _convolve(x.to(dtype), kernels, geometry)
    mean, var = gamma.new_zeros((2, len(gamma))).unbind()  # of which the batch's become all
    normalized, batch_mean, inverse = torch.ops.aten.native_batch_norm(
        z, gamma, beta, mean, var, True, 1.0, geometry.eps[0]
    )
    grouped = (geometry.groups, geometry.norms, -1)
    y = normalized.unflatten(1, grouped).sum(2).flatten(1, 2)
    number = geometry.patches(x)
    biased = var * ((number - 1) / number)
    statistics = [_by_branch(v, geometry).unflatten(1, grouped[::2]) for v in (mean, biased)]
    return [y.relu_() if relu else y, *statistics, kernels, gamma, batch_mean, inverse]


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
    _, _, kernels, gamma, mean, inverse = kept
    if y is not None:
        g = torch.ops.aten.threshold_backward(g, y, 0)
    narrow = x.to(kernels.dtype)
    z = _convolve(narrow, kernels, geometry)
    dz, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        _to_branches(g, geometry), z, gamma, None, None, mean, inverse, True, 0.0, [True] * 3
    )
    walk = [[n, n] for n in geometry.walk]
    dx, dkernels, _ = torch.ops.aten.convolution_backward(
        dz, narrow, kernels, None, *walk, False, [0, 0], geometry.groups, [inward, True, False]
    )
    own = tensors[0].dtype
    rows = list(_by_branch(dkernels, geometry).to(own).unbind()[: geometry.branches])
    if tensors[geometry.branches - 1].shape[-1] < geometry.kernel_size:
        middle = geometry.kernel_size // 2
        rows[-1] = rows[-1][..., middle : middle + 1, middle : middle + 1]
    dnorms = [_by_branch(grad, geometry).to(own).unbind() for grad in (dgamma, dbeta)]
    return [x.new_empty(0) if dx is None else dx.to(x.dtype), *rows, *dnorms[0], *dnorms[1]]


def _stack(geometry: Geometry, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels (G · B · O, C_in / G, K, K), the skip's among them; γ and β, (G · B · O,)."""
    count, norms, size = geometry.branches, geometry.norms, geometry.kernel_size
    kernels = [center_pad(w, size) if w.shape[-1] < size else w for w in tensors[:count]]
    if geometry.skip:
        kernels.append(identity_kernel(geometry.out_chs, geometry.groups, size, kernels[0]))
    gamma = _interleave(tensors[count : count + norms], geometry)
    beta = _interleave(tensors[count + norms :], geometry)
    return _interleave(kernels, geometry), at_least_float32(gamma), at_least_float32(beta)


def _interleave(tensors: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """B of (G · O, …) as (G · B · O, …): the outputs of a group lie together."""
    return torch.stack([t.unflatten(0, (geometry.groups, -1)) for t in tensors], 1).flatten(0, 2)


def _by_branch(stacked: Tensor, geometry: Geometry) -> Tensor:
    """The inverse: (G · B · O, …) to (B, G · O, …)."""
    grouped = stacked.unflatten(0, (geometry.groups, geometry.norms, -1))
    return grouped.transpose(0, 1).contiguous().flatten(1, 2)


def _to_branches(g: Tensor, geometry: Geometry) -> Tensor:
    """Hand g (N, G · O, H, W) to every branch: (N, G · B · O, H, W), in g's layout."""
    groups, norms = geometry.groups, geometry.norms
    if geometry.depthwise:
        return g.repeat_interleave(norms, 1)
    if groups == 1:
        return torch.cat([g] * norms, 1)
    return torch.stack([g.unflatten(1, (groups, -1))] * norms, 2).flatten(1, 3)


def _convolve(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    return F.conv2d(x, kernels, None, *geometry.walk, geometry.groups)
