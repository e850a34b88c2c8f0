"""What a foldable block is made of: branches, a place to convolve, and what follows.

A row a class: blocks of this project, and timm's of ByobNet and FastViT.
"""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="arg-type,union-attr,index,assignment,misc"

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from timm.layers import ConvNormAct
from timm.models import byobnet, fastvit
from torch import Tensor, nn

from mobileone.block import MobileOneBlock
from mobileone.folding import at_least_float32, batch_norm_affine, center_pad, identity_kernel

__all__ = ["BLOCKS", "DEAD", "PLAIN", "Branch", "Row", "fold_branches", "variances"]

DEAD = 0.1
"""Part of the variance of rounding below which a branch's own variance is nothing but noise."""


class Branch(NamedTuple):
    """A convolution without bias and its BatchNorm.

    Attributes:
        kernel: (C_out, C_in / groups, K, K), padded where the branch's own is smaller.
        norm: The BatchNorm; None adds the kernel and `factor`, a bias, as they are.
        factor: Of the BatchNorm's output, (C_out,); None for 1.
        skip: Whether the kernel is the identity.
    """

    kernel: Tensor
    norm: Any = None
    factor: Tensor | None = None
    skip: bool = False


class Row(NamedTuple):
    """How to read a class of blocks.

    Attributes:
        conv: The convolution whose stride, padding, dilation and groups the folded one has.
        branches: The branches, the BatchNorm skip last.
        after: Names of the modules that follow the sum.
        sums: Whether the block is a plain sum of branches, which may train on batch statistics.
    """

    conv: Callable[[Any], nn.Conv2d]
    branches: Callable[[Any], list[Branch]]
    after: tuple[str, ...] = ()
    sums: bool = True


def _skip(norm: nn.Module, conv: nn.Conv2d, factor: Tensor | None = None) -> Branch:
    kernel = identity_kernel(conv.out_channels, conv.groups, conv.kernel_size[0], conv.weight)
    return Branch(kernel, norm, factor, skip=True)


def _mobileone(block: Any, factor: Tensor | None = None) -> list[Branch]:
    """MobileOne's block, here, in ByobNet or in FastViT."""
    conv = block.conv_kxk[0].conv
    found = [Branch(branch.conv.weight, branch.bn, factor) for branch in block.conv_kxk]
    if (scale := block._modules.get("conv_scale")) is not None:
        kernel = center_pad(scale.conv.weight, conv.kernel_size[0])
        found.append(Branch(kernel, scale.bn, factor))
    if (identity := block._modules.get("identity")) is not None:
        found.append(_skip(identity, conv, factor))
    return found


def _repvgg(block: Any) -> list[Branch]:
    conv = block.conv_kxk.conv
    small = center_pad(block.conv_1x1.conv.weight, conv.kernel_size[0])
    found = [Branch(conv.weight, block.conv_kxk.bn), Branch(small, block.conv_1x1.bn)]
    identity = block._modules.get("identity")
    return found if identity is None else [*found, _skip(identity, conv)]


def _large_kernel(block: Any) -> list[Branch]:
    conv = block.large_conv.conv
    found = [Branch(conv.weight, block.large_conv.bn)]
    if (small := block._modules.get("small_conv")) is not None:
        margin = (conv.kernel_size[0] - small.conv.kernel_size[0]) // 2
        kernel = nn.functional.pad(small.conv.weight, [margin] * 4)
        found.append(Branch(kernel, small.bn))
    return found


def _rep_mixer(block: Any) -> list[Branch]:
    """x + γ (mixer(x) − norm(x))."""
    conv = block.mixer.conv_kxk[0].conv
    gamma = getattr(block.layer_scale, "gamma", None)
    gamma = conv.weight.new_ones(len(conv.weight)) if gamma is None else gamma.flatten()
    skip = _skip(block.norm.identity, conv, -gamma)
    return [*_mobileone(block.mixer, gamma), skip, Branch(skip.kernel)]


def _position(block: Any) -> list[Branch]:
    """x + conv(x), the convolution with a bias."""
    conv = block.pos_enc
    kernel = identity_kernel(conv.out_channels, conv.groups, conv.kernel_size[0], conv.weight)
    return [Branch(conv.weight, None, conv.bias), Branch(kernel)]


def _conv_norm(block: Any) -> list[Branch]:
    return [Branch(block.conv.weight, block.bn)]


def _plain(layer: Any) -> list[Branch]:
    return [Branch(layer.weight, None, layer.bias)]


def _first(block: Any) -> Any:
    return block.conv_kxk[0].conv


BLOCKS: dict[type[nn.Module], Row] = {
    MobileOneBlock: Row(_first, _mobileone, ("attn", "act")),
    byobnet.MobileOneBlock: Row(_first, _mobileone, ("attn", "act")),
    byobnet.RepVggBlock: Row(lambda block: block.conv_kxk.conv, _repvgg, ("attn", "act")),
    fastvit.MobileOneBlock: Row(_first, _mobileone, ("se", "act")),
    fastvit.ReparamLargeKernelConv: Row(
        lambda block: block.large_conv.conv, _large_kernel, ("se", "act")
    ),
    fastvit.RepMixer: Row(lambda block: _first(block.mixer), _rep_mixer, sums=False),
    fastvit.RepConditionalPosEnc: Row(lambda block: block.pos_enc, _position, sums=False),
    ConvNormAct: Row(lambda block: block.conv, _conv_norm, ("bn.drop", "bn.act")),
}
"""Blocks that fold into one convolution."""

PLAIN: dict[type[nn.Module], Row] = {
    nn.Conv2d: Row(lambda layer: layer, _plain, sums=False),
    nn.Linear: Row(lambda layer: layer, _plain, sums=False),
}
"""Layers that are one product as they are."""


def fold_branches(branches: Iterable[Branch], noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the convolution that equals the branches on a noisy input.

    Noise of variance n on every input of a branch adds n Σⱼ Wⱼ² to its output's variance v, which
    BatchNorm normalizes: a = γ / sqrt(v + n Σⱼ Wⱼ² + ε). A branch of which nearly all would be
    noise becomes its constant β.

    Args:
        branches: Of the block.
        noise: n, a scalar; 0 folds as ever.

    Returns:
        Kernel (C_out, C_in / groups, K, K) and bias (C_out,), in float32 or better.
    """
    weight: Tensor | None = None
    bias: Tensor | None = None
    for branch in branches:
        w, b = _fold(branch, noise)
        weight = w if weight is None else weight + w
        bias = b if bias is None else bias + b
    assert weight is not None and bias is not None
    return weight, bias


def _fold(branch: Branch, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    kernel, norm, factor, _ = branch
    kernel = at_least_float32(kernel)
    if norm is None:
        bias = kernel.new_zeros(len(kernel)) if factor is None else factor.to(kernel.dtype)
        return kernel, bias
    var, added = variances(branch, noise)
    mean, eps = norm.running_mean, norm.eps
    scale, shift = batch_norm_affine(mean, var + added, norm.weight, norm.bias, eps)
    dead = var < DEAD * added
    constant = torch.zeros_like(shift) if norm.bias is None else norm.bias.to(shift.dtype)
    scale, shift = torch.where(dead, 0, scale), torch.where(dead, constant, shift)
    if factor is not None:
        scale, shift = scale * factor, shift * factor
    return kernel * scale.view(-1, 1, 1, 1), shift


def variances(branch: Branch, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """Running variance of a branch, and what noise on its inputs adds to it: (C_out,) each."""
    var = at_least_float32(branch.norm.running_var)
    energy = at_least_float32(branch.kernel).square().flatten(1).sum(1)
    return var, energy * noise
