"""The small algebra of collapsed training: branches and input statistics to one affine map.

Notation of docs/collapsed-training.md. The J = K²·C_in/G inputs of a patch and the O = C_out/G
outputs that read them form a group; with m and C the mean and covariance of the patches, branch i
has μᵢ = Wᵢ m, vᵢ = diag(Wᵢ C Wᵢᵀ), aᵢ = γᵢ / sqrt(vᵢ + ε), and the block is Ŵ = Σ aᵢWᵢ with
bias b̂ = Σ βᵢ − Ŵ m. The skip is the branch whose rows are unit vectors. Nothing here depends on
where the patches' origin is, so that they may be shifted by a constant together with m.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BranchGrads",
    "Branches",
    "Collapsed",
    "PatchStatistics",
    "branch_backward",
    "branch_means",
    "branch_variances",
    "collapse",
]


class PatchStatistics(NamedTuple):
    """First and second moments of the patches that the convolution reads.

    Attributes:
        mean: m, (G, J), in float64.
        cov: C, the biased covariance, (G, J, J); symmetric.
        number: n, the number of patches: N · H' · W'.
    """

    mean: Tensor
    cov: Tensor
    number: int


@dataclass(frozen=True)
class Branches:
    """The branches as matrices, in the dtype of the statistics.

    Attributes:
        kernels: Wᵢ of the B convolution branches (a scale branch is padded), (B, G, O, J).
        gamma: γᵢ of the B branches and then of the skip, (B or B + 1, G, O).
        beta: Σᵢ βᵢ, (G, O).
        eps: ε of each branch, (B or B + 1, 1, 1).
        center: Index in a patch of each skip output's input, (O,); None without a skip.
    """

    kernels: Tensor
    gamma: Tensor
    beta: Tensor
    eps: Tensor
    center: Tensor | None


class Collapsed(NamedTuple):
    """The affine map that the block is on this batch, and what led to it.

    Attributes:
        weight: Ŵ, (G, O, J).
        bias: b̂, (G, O).
        var: vᵢ of every branch, the skip last, (B or B + 1, G, O); at least 0.
        scale: aᵢ likewise.
    """

    weight: Tensor
    bias: Tensor
    var: Tensor
    scale: Tensor


class BranchGrads(NamedTuple):
    """Gradients with respect to the branches and, through the statistics, to the patches.

    Attributes:
        kernels: (B, G, O, J).
        gamma: (B or B + 1, G, O).
        beta: (G, O); the same for every branch.
        slope: S = (2/n) ∂L/∂C, (G, J, J): a patch x receives S x + offset in addition to Ŵᵀg.
        offset: r = (1/n) ∂L/∂m − S m, (G, J).
    """

    kernels: Tensor
    gamma: Tensor
    beta: Tensor
    slope: Tensor
    offset: Tensor


def branch_means(branches: Branches, mean: Tensor) -> Tensor:
    """μᵢ of every branch, the skip last, (B or B + 1, G, O), from m (G, J), in m's dtype."""
    means = torch.matmul(branches.kernels.to(mean.dtype), mean[:, :, None]).squeeze(-1)
    if branches.center is None:
        return means
    return torch.cat((means, mean[None, :, branches.center]))


def branch_variances(branches: Branches, cov: Tensor, product: Tensor) -> Tensor:
    """vᵢ of every branch, the skip last, (B or B + 1, G, O), from C (G, J, J); at least 0.

    `product` is Wᵢ C of the convolution branches, (B, G, O, J).
    """
    variances = (product * branches.kernels).sum(-1)
    if branches.center is not None:
        own = cov.diagonal(dim1=-2, dim2=-1)[:, branches.center]  # (G, O)
        variances = torch.cat((variances, own[None]))
    return variances.clamp_(min=0.0)


def collapse(branches: Branches, mean: Tensor, var: Tensor) -> Collapsed:
    """Compute Ŵ and b̂ from m (G, J) and the branches' variances."""
    kernels, center = branches.kernels, branches.center
    scale = branches.gamma * (var + branches.eps).rsqrt()
    weight = (scale[: len(kernels), ..., None] * kernels).sum(0)
    if center is not None:
        weight[:, torch.arange(len(center), device=center.device), center] += scale[-1]
    bias = branches.beta - torch.matmul(weight.to(mean.dtype), mean[:, :, None]).squeeze(-1)
    return Collapsed(weight, bias, var, scale)


def branch_backward(
    weight_grad: Tensor,
    bias_grad: Tensor,
    branches: Branches,
    stats: PatchStatistics,
    folded: Collapsed,
) -> BranchGrads:
    """Carry gradients back to the branches and the patches.

    P = Σ g (x − m)ᵀ, (G, O, J), is ∂L/∂Ŵ with m's part in it; q = Σ g, (G, O), in float64, is
    ∂L/∂b̂.
    ⟨P, Wᵢ⟩ = ∂L/∂aᵢ reaches γᵢ and vᵢ, and vᵢ reaches Wᵢ and C; ∂L/∂m = −Ŵᵀq.
    """
    kernels, center, (m, cov, n) = branches.kernels, branches.center, stats
    count, a = len(kernels), folded.scale
    da = (weight_grad * kernels).sum(-1)  # (B, G, O)
    if center is not None:
        own = weight_grad[:, torch.arange(len(center), device=center.device), center]
        da = torch.cat((da, own[None]))
    inverse = (folded.var + branches.eps).rsqrt()
    dv = -0.5 * da * a * inverse.square()

    slanted = (2.0 * dv[:count])[..., None] * kernels  # rows 2 ∂L/∂vᵢ · Wᵢ
    dw = torch.matmul(slanted, cov).addcmul_(a[:count, ..., None], weight_grad)
    groups, _, patch = weight_grad.shape
    tall = kernels.transpose(0, 1).reshape(groups, -1, patch)  # (G, B·O, J)
    slope = torch.matmul(
        tall.transpose(1, 2), slanted.transpose(0, 1).reshape(groups, -1, patch)
    ).div_(n)
    if center is not None:
        slope[:, center, center] += 2.0 * dv[-1] / n
    pulled = torch.matmul(bias_grad[:, None], folded.weight.to(m.dtype)) / n
    pulled += torch.matmul(m[:, None], slope.to(m.dtype))
    return BranchGrads(dw, da * inverse, bias_grad, slope, -pulled.squeeze(1))
