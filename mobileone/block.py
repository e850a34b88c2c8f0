"""The MobileOne block: linear branches in training, one convolution afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.byobnet import LayerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobileone.block_checks import (
    FoldingNotice,
    check_block,
    check_norm,
    check_norm_factory,
    check_statistics,
)
from mobileone.collapsed import CollapseMode, Plan, is_hooked, plan_collapsed, run_collapsed
from mobileone.folding import (
    batch_norm_affine,
    center_pad,
    fold_conv_bn,
    identity_kernel,
    slice_before_1x1,
)

__all__ = ["FusedMobileOneBlock", "MobileOneBlock"]


class FusedMobileOneBlock(nn.Module):
    """The deployed form of a block: convolution with bias -> attention -> activation.

    Args:
        conv: The folded convolution; the input (N, C_in, H, W) goes through it first.
        attn: Squeeze-and-excite or `nn.Identity`.
        act: The activation.
    """

    def __init__(self, conv: nn.Conv2d, attn: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.reparam_conv = conv
        self.attn = attn
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        return self.act(self.attn(self.reparam_conv(x)))

    def fuse(self) -> "FusedMobileOneBlock":
        """Return the block itself: it is folded already."""
        return self


# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="arg-type,union-attr,index,call-overload,return-value,untyped-decorator"


class MobileOneBlock(nn.Module):
    """Over-parameterized block of MobileOne (Vasu et al., CVPR 2023, Section 3.2 and Figure 3).

    In training, y = act(attn(Σᵢ BN(Wᵢ ∗ x) + BN(w ∗ x) + BN(x))): k convolution branches, a 1×1
    "scale" branch where K > 1, and a BatchNorm skip where input and output agree in shape.
    Whenever BatchNorm runs on fixed statistics (in eval mode, or frozen), the block computes the
    one convolution that equals this sum, folded again from the current weights.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Odd kernel size K of the convolution branches.
        stride: Stride of all branches.
        dilation: Dilation of the K×K branches.
        groups: Groups of all convolutions; `in_chs` makes a depthwise block.
        num_conv_branches: The over-parameterization factor k, at least 1.
        use_scale: Build the 1×1 scale branch; needs K > 1. Default: build it where that holds.
        use_skip: Build the BatchNorm skip; needs `in_chs == out_chs` and stride 1. Default: build
            it where that holds.
        drop_path_rate: Stochastic depth on the branches other than the skip; no effect without one.
        layers: timm's layer factories (convolution–norm, norm, activation, attention). The norm is
            a BatchNorm with running statistics: no other folds exactly.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An argument breaks a rule above.

    Example:
        >>> block = MobileOneBlock(16, 16, groups=16, num_conv_branches=4).eval()
        >>> fused = block.fuse()  # one depthwise convolution and a ReLU
    """

    # part of the training run, so not a buffer; of the class, so that blocks pickled by versions
    # without it have it; see set_collapse
    collapse: CollapseMode = "auto"
    __jit_ignored_attributes__ = ("collapse",)

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        num_conv_branches: int = 1,
        use_scale: bool | None = None,
        use_skip: bool | None = None,
        drop_path_rate: float = 0.0,
        layers: LayerFn | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_block(
            in_chs, out_chs, kernel_size, stride, groups, num_conv_branches, use_scale, use_skip
        )
        layers = layers or LayerFn()
        check_norm_factory(layers.norm_act)
        dd = {"device": device, "dtype": dtype}
        shared = {"stride": stride, "groups": groups, "apply_act": False, **dd}
        skip_fits = in_chs == out_chs and stride == 1
        with_skip = skip_fits if use_skip is None else use_skip

        self.identity = layers.norm_act(out_chs, apply_act=False, **dd) if with_skip else None
        self.conv_kxk = nn.ModuleList(
            layers.conv_norm_act(
                in_chs, out_chs, kernel_size=kernel_size, dilation=dilation, **shared
            )
            for _ in range(num_conv_branches)
        )
        self.conv_scale = None
        if kernel_size > 1 if use_scale is None else use_scale:
            self.conv_scale = layers.conv_norm_act(in_chs, out_chs, kernel_size=1, **shared)
            slice_before_1x1(self.conv_scale.conv)
        for norm in self.norms():
            check_norm(norm)
        drops = drop_path_rate > 0.0 and with_skip
        self.drop_path = DropPath(drop_path_rate) if drops else nn.Identity()
        self.attn = nn.Identity() if layers.attn is None else layers.attn(out_chs, **dd)
        self.act = layers.act(inplace=True)
        self.notice = FoldingNotice()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        if torch.jit.is_scripting():
            y = self._sum_branches(x) if self.training else self._folded_conv(x)
        elif self._is_affine():
            y = self._folded_conv(x)
        else:
            return self._forward_training(x)
        return self.act(self.attn(y))

    @torch.jit.unused
    def _forward_training(self, x: Tensor) -> Tensor:
        """Train in the cheapest exact form."""
        return self.train_as(plan_collapsed(self, x), x)

    @torch.jit.unused
    def train_as(self, plan: Plan | None, x: Tensor) -> Tensor:
        """Train in a form; running statistics stay while checkpointing recomputes.

        The collapsed forms rectify as well where a ReLU follows, so that it keeps no copy.

        Args:
            plan: The collapsed form; None: the branches.
            x: Input (N, C_in, H, W).

        Returns:
            Output (N, C_out, H', W').
        """
        # what a compiler records, it recomputes itself
        recomputing = not torch.compiler.is_compiling() and _is_in_backward_pass()
        if plan is None:
            with _shadowed_buffers(self.norms()) if recomputing else nullcontext():
                return self.act(self.attn(self._sum_branches(x)))
        relu = type(self.attn) is nn.Identity and type(self.act) is nn.ReLU
        relu = relu and not is_hooked(self.attn) and not is_hooked(self.act)
        relu = relu and not plan.to_channels_last
        y = run_collapsed(self, plan, x, relu=relu, update_statistics=not recomputing)
        return y if relu else self.act(self.attn(y))

    def _folded_conv(self, x: Tensor) -> Tensor:
        conv = self.conv_kxk[0].conv
        weight, bias = self.fold()
        weight, bias = weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _sum_branches(self, x: Tensor) -> Tensor:
        """Sum of all branches before attention and activation: (N, C_in, H, W) -> (N, C_out, …)."""
        y: Tensor | None = None
        if self.conv_scale is not None:
            y = self.conv_scale(x)
        for branch in self.conv_kxk:
            z = branch(x)
            y = z if y is None else y.add_(z)
        assert y is not None
        y = self.drop_path(y)
        if self.identity is not None:
            y = y.add_(self.identity(x))
        return y

    @torch.jit.unused
    def norms(self) -> list[nn.Module]:
        """The BatchNorms of all branches, the skip's last."""
        norms = [branch.bn for branch in self.conv_kxk]
        if self.conv_scale is not None:
            norms.append(self.conv_scale.bn)
        if self.identity is not None:
            norms.append(self.identity)
        return norms

    @torch.jit.unused
    def _is_affine(self) -> bool:
        """Whether the block is one fixed affine map: no batch statistics, no stochastic depth."""
        if self.training and type(self.drop_path) is not nn.Identity:
            return False
        return not any(
            isinstance(bn, _BatchNorm) and (bn.training or bn.running_mean is None)
            for bn in self.norms()
        )

    def fold(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the one convolution that equals the branches on running statistics.

        Computed in float32 or better and differentiable in the parameters.

        Returns:
            Kernel of shape (C_out, C_in / groups, K, K) and bias of shape (C_out,).

        Raises:
            ValueError: A normalization layer keeps no running statistics.
        """
        own = self.conv_kxk[0].conv
        terms: list[tuple[Tensor, Tensor]] = []
        for branch in self.conv_kxk:
            bn = branch.bn
            affine = batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
            terms.append(fold_conv_bn(branch.conv.weight, affine))
        if self.conv_scale is not None:
            bn = self.conv_scale.bn
            affine = batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
            weight = center_pad(self.conv_scale.conv.weight, own.kernel_size[0])
            terms.append(fold_conv_bn(weight, affine))
        if self.identity is not None:
            bn = self.identity
            affine = batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
            weight = identity_kernel(own.out_channels, own.groups, own.kernel_size[0], own.weight)
            terms.append(fold_conv_bn(weight, affine))
        weight, bias = terms[0]
        for w, b in terms[1:]:
            weight, bias = weight + w, bias + b
        return weight, bias

    @torch.jit.unused
    def fuse(self) -> FusedMobileOneBlock:
        """Fold the branches into a new, plain block; this block stays as it is.

        Folds on the running statistics, in float32 or better, and then casts to the block's
        dtype. Device, training flag and `requires_grad` carry over; attention and activation are
        shared with this block.

        Returns:
            The block in deployed form.

        Raises:
            ValueError: A normalization layer keeps no running statistics.
        """
        check_statistics(self.norms())
        if not self._is_affine():
            self.notice.warn_once()
        with torch.no_grad():
            weight, bias = self.fold()
        fused = self.empty_fused()
        conv, dtype = fused.reparam_conv, self.conv_kxk[0].conv.weight.dtype
        trainable = any(p.requires_grad for p in self.conv_kxk.parameters())
        conv.weight = nn.Parameter(weight.to(dtype), requires_grad=trainable)
        conv.bias = nn.Parameter(bias.to(dtype), requires_grad=trainable)
        return fused

    @torch.jit.unused
    def empty_fused(self) -> FusedMobileOneBlock:
        """The deployed form with unset convolution weights, to load folded weights into."""
        conv = self.conv_kxk[0].conv
        plain = nn.utils.skip_init(
            nn.Conv2d,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        fused = FusedMobileOneBlock(plain, self.attn, self.act)
        # not fused.train(): that would reset the flags of a frozen attention
        fused.training = plain.training = self.training
        return fused


def _is_in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def _shadowed_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Let the modules write to copies of their buffers; put the untouched originals back."""
    kept = [dict(module._buffers) for module in modules]
    for module, buffers in zip(modules, kept, strict=True):
        copies = {k: None if b is None else b.clone() for k, b in buffers.items()}
        module._buffers.update(copies)
    try:
        yield
    finally:
        for module, buffers in zip(modules, kept, strict=True):
            module._buffers.update(buffers)
