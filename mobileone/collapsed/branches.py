"""What collapsed training reads from a block, and the running statistics it writes back."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="arg-type,union-attr,index,operator,misc,list-item,call-overload"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mobileone.collapsed.algebra import Branches, BranchGrads
from mobileone.folding import StridedPointwise

if TYPE_CHECKING:
    from mobileone.collapsed.dispatch import Plan

__all__ = [
    "BranchedBlock",
    "CollapseMode",
    "Geometry",
    "branch_gradients",
    "describe",
    "gather_branches",
    "is_hooked",
    "parameters",
    "unsupported_reason",
    "update_running_statistics",
    "with_parts",
]


CollapseMode = Literal["auto", "always", "never", "measured"]
"""`auto`: the cheapest form, by a cost model on a CPU and by trial on CUDA; `measured`: by trial on
either; `always`: a collapsed one, on CUDA the stacked form from four BatchNorms on, else branches;
`never`: the branches."""


class BranchedBlock(Protocol):
    """What collapsed training reads of a block: its branches, and how they shall train.

    Attributes:
        conv_kxk: K×K branches, each with `conv` and `bn`.
        conv_scale: The 1×1 branch, likewise; None where there is none.
        identity: The BatchNorm of the skip; None where there is none.
        drop_path: Stochastic depth on the branches.
        collapse: The mode that `set_collapse` sets.
    """

    conv_kxk: nn.ModuleList
    conv_scale: nn.Module | None
    identity: nn.Module | None
    drop_path: nn.Module
    collapse: CollapseMode
    _modules: dict[str, nn.Module | None]

    def norms(self) -> list[nn.Module]:
        """The BatchNorms of all branches, the skip's last."""
        ...

    def train_as(self, plan: Plan | None, x: Tensor) -> Tensor:
        """Train on x in a form; None: in the branches."""
        ...


@dataclass(frozen=True)
class Geometry:
    """Shape of a block whose branches can be collapsed.

    Attributes:
        in_chs: C_in.
        out_chs: C_out.
        kernel_size: K.
        stride: Stride of every branch.
        padding: Zero padding of the K×K branches.
        dilation: Dilation of the K×K branches.
        groups: G.
        branches: Convolution branches, the scale branch included.
        skip: Whether there is a BatchNorm skip.
        eps: ε of every BatchNorm, the skip's last.
    """

    in_chs: int
    out_chs: int
    kernel_size: int
    stride: int
    padding: int
    dilation: int
    groups: int
    branches: int
    skip: bool
    eps: tuple[float, ...]

    @property
    def patch(self) -> int:
        """J, the number of inputs of one output."""
        return self.kernel_size**2 * self.in_chs // self.groups

    @property
    def pointwise(self) -> bool:
        """Whether a patch is one pixel of all channels."""
        return self.kernel_size == 1 and self.stride == 1 and self.groups == 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved alone, to one output."""
        return self.groups == self.in_chs == self.out_chs

    @property
    def norms(self) -> int:
        """BatchNorms: one a branch, the skip included."""
        return self.branches + self.skip

    @property
    def walk(self) -> tuple[int, int, int]:
        """Stride, padding and dilation, as `F.conv2d` takes them."""
        return self.stride, self.padding, self.dilation

    def patches(self, x: Tensor) -> int:
        """n, the number of patches of an input (N, C_in, H, W): N · H' · W'."""
        height, width = self.output_size(*x.shape[2:])
        return x.shape[0] * height * width

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """H', W' for an input of H, W."""
        reach = self.dilation * (self.kernel_size - 1) - 2 * self.padding
        return (height - reach - 1) // self.stride + 1, (width - reach - 1) // self.stride + 1


def describe(block: BranchedBlock) -> Geometry:
    """Read a block's geometry; valid where `unsupported_reason` is None."""
    first, norms = block.conv_kxk[0].conv, block.norms()
    return Geometry(
        in_chs=first.in_channels,
        out_chs=first.out_channels,
        kernel_size=first.kernel_size[0],
        stride=first.stride[0],
        padding=first.padding[0],
        dilation=first.dilation[0],
        groups=first.groups,
        branches=len(norms) - (block.identity is not None),
        skip=block.identity is not None,
        eps=tuple(norm.eps for norm in norms),
    )


def unsupported_reason(block: BranchedBlock) -> str | None:
    """Why a block's branches are not what the algebra describes; None: they are.

    It describes bias-free, zero-padded convolutions and plain BatchNorms on batch statistics with
    affine terms and running averages, without hooks: what does not run calls none.
    """
    if type(block.drop_path) is not nn.Identity:
        return "stochastic depth on the branches"
    like = block.conv_kxk[0].conv
    if not all(map(_is_plain_branch, _conv_branches(block))) or not all(
        _walks_as(branch.conv, like) for branch in block.conv_kxk
    ):
        return "a branch that is not a plain convolution and a BatchNorm, or unlike the others"
    if not all(map(_is_plain_norm, block.norms())):
        return "a BatchNorm that is synchronized, frozen, or without affine or running terms"
    names = ("conv_kxk", "conv_scale", "drop_path", "identity")
    parts = with_parts([block._modules.get(name) for name in names])
    if _has_any_global_hook() or any(map(is_hooked, parts)):
        return "a layer with a hook or a forward of its own"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks or a forward of its own; its children are not looked at."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def parameters(block: BranchedBlock) -> list[Tensor]:
    """Kernels of all convolution branches, then γ of all BatchNorms, then β of all."""
    norms = block.norms()
    return [
        *(branch.conv.weight for branch in _conv_branches(block)),
        *(norm.weight for norm in norms),
        *(norm.bias for norm in norms),
    ]


def gather_branches(geometry: Geometry, tensors: Sequence[Tensor], dtype: torch.dtype) -> Branches:
    """Arrange `parameters(block)` as matrices in the dtype of the statistics."""
    count, norms = geometry.branches, geometry.branches + geometry.skip
    groups, outputs = geometry.groups, geometry.out_chs // geometry.groups
    kernels = [_as_rows(kernel, geometry) for kernel in tensors[:count]]
    gamma, beta = tensors[count : count + norms], tensors[count + norms :]
    device = kernels[0].device
    center = None
    if geometry.skip:
        area = geometry.kernel_size**2
        center = torch.arange(outputs, device=device) * area + area // 2
    return Branches(
        kernels=torch.stack(kernels).to(dtype),
        gamma=torch.stack(tuple(gamma)).to(dtype).view(norms, groups, outputs),
        beta=torch.stack(tuple(beta)).to(dtype).sum(0).view(groups, outputs),
        eps=torch.tensor(geometry.eps, dtype=dtype, device=device).view(norms, 1, 1),
        center=center,
    )


def branch_gradients(
    geometry: Geometry, grads: BranchGrads, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Undo `gather_branches`: the gradient of every tensor of `parameters(block)`."""
    count, norms = geometry.branches, geometry.branches + geometry.skip
    kernels = [
        _from_rows(grad, geometry, like)
        for grad, like in zip(grads.kernels.unbind(), tensors[:count], strict=True)
    ]
    dtype = tensors[0].dtype
    gamma = grads.gamma.flatten(1).to(dtype).unbind()
    beta = [grads.beta.flatten().to(dtype)] * norms
    return [*kernels, *gamma, *beta]


def update_running_statistics(block: BranchedBlock, mean: Tensor, var: Tensor, count: int) -> None:
    """Move every BatchNorm's running averages as its own forward pass would.

    Args:
        block: The block whose BatchNorms are moved.
        mean: Batch means of the branches, (branches, C_out).
        var: Biased batch variances, likewise.
        count: n, the number of values a channel; the running variance takes the unbiased one.
    """
    norms = block.norms()
    running = [n.running_mean for n in norms] + [n.running_var for n in norms]
    unbiased = var * (count / (count - 1))
    new = [*mean.to(running[0].dtype).unbind(), *unbiased.to(running[0].dtype).unbind()]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    momenta = [norm.momentum for norm in norms]
    if None not in momenta and len(set(momenta)) == 1:
        torch._foreach_lerp_(running, new, momenta[0])
        return
    for old, value, norm in zip(running, new, norms * 2, strict=True):
        tracked = norm.num_batches_tracked  # a cumulative average where there is no momentum
        momentum = 1 / tracked.to(old.dtype) if norm.momentum is None else norm.momentum
        old.lerp_(value, momentum)


def _conv_branches(block: BranchedBlock) -> list[nn.Module]:
    scale = [] if block.conv_scale is None else [block.conv_scale]
    return [*block.conv_kxk, *scale]


def with_parts(modules: list[nn.Module | None]) -> list[nn.Module]:
    """The modules and all inside; `modules()`, which looks for doubles, takes thrice the time."""
    found: list[nn.Module] = []
    while modules:
        module = modules.pop()
        if module is not None:
            found.append(module)
            modules += module._modules.values()
    return found


def _as_rows(kernel: Tensor, geometry: Geometry) -> Tensor:
    """(C_out, C_in/G, K, K), or the 1×1 kernel of a scale branch, as (G, O, J)."""
    if kernel.shape[-1] < geometry.kernel_size:
        kernel = F.pad(kernel, [geometry.kernel_size // 2] * 4)
    return kernel.reshape(geometry.groups, -1, geometry.patch)


def _from_rows(rows: Tensor, geometry: Geometry, like: Tensor) -> Tensor:
    size, margin = geometry.kernel_size, (geometry.kernel_size - like.shape[-1]) // 2
    kernel = rows.reshape(*like.shape[:2], size, size)
    if margin:
        kernel = kernel[..., margin:-margin, margin:-margin]
    return kernel.to(like.dtype, memory_format=torch.contiguous_format)


def _is_plain_branch(branch: nn.Module) -> bool:
    return (
        type(branch).forward is ConvNormAct.forward
        and type(branch.aa) in (nn.Identity, type(None))
        and _is_plain_conv(branch.conv)
    )


def _is_plain_conv(conv: nn.Module) -> bool:
    return (
        type(conv) in (nn.Conv2d, StridedPointwise)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
    )


def _walks_as(conv: nn.Module, other: nn.Module) -> bool:
    """Whether two convolutions take the same patches."""
    return all(
        getattr(conv, name) == getattr(other, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "groups")
    )


def _is_plain_norm(norm: nn.Module) -> bool:
    return bool(
        type(norm) in (nn.BatchNorm2d, BatchNormAct2d)
        and norm.training
        and norm.track_running_stats
        and norm.weight is not None
        and norm.running_mean is not None
        and norm.num_batches_tracked is not None
        and all(type(child) is nn.Identity for child in norm.children())
    )
