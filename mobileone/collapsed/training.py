"""The training path of a block: pick an exact form, run it, move the running statistics."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="union-attr,assignment"

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mobileone.collapsed.affine import AffineConvolution
from mobileone.collapsed.branches import (
    Geometry,
    describe,
    is_plain,
    parameters,
    update_running_statistics,
)
from mobileone.collapsed.depthwise import DepthwiseConvolution, has_kernels
from mobileone.collapsed.gram import GramConvolution
from mobileone.collapsed.policy import CollapseMode, Path, Setting, choose

if TYPE_CHECKING:
    from mobileone.block import MobileOneBlock

__all__ = ["Plan", "path_of", "plan_collapsed", "run_collapsed", "set_collapse"]

_KERNEL_FORMS = {
    Path.DEPTHWISE: DepthwiseConvolution,
    Path.AFFINE: AffineConvolution,
}


def set_collapse(model: nn.Module, mode: CollapseMode) -> None:
    """Say how the MobileOne blocks of a model train from now on.

    The mode belongs to the training run, not to the checkpoint: no state dict holds it, and all
    modes give the same numbers up to rounding.

    Args:
        model: A model with MobileOne blocks anywhere inside.
        mode: "auto", the default, takes the cheapest form of every block; "always" the one that
            keeps the least memory for the backward pass; "never" runs every branch.

    Raises:
        ValueError: The mode is unknown, or there is no MobileOne block in training form.
    """
    from mobileone.block import MobileOneBlock  # the block imports this package

    if mode not in get_args(CollapseMode):
        known = ", ".join(map(repr, get_args(CollapseMode)))
        raise ValueError(f"`mode` (={mode!r}) must be one of {known}")
    blocks = [module for module in model.modules() if isinstance(module, MobileOneBlock)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no MobileOne block with branches to collapse: "
            "`collapse` has no meaning for it"
        )
    for block in blocks:
        block.collapse = mode


class Plan(NamedTuple):
    """A block's collapsed form for one batch.

    Attributes:
        path: The form; not the branches.
        geometry: The block's shape.
        dtype: Of the convolution.
        tensors: Its `parameters`.
    """

    path: Path
    geometry: Geometry
    dtype: torch.dtype
    tensors: list[Tensor]


def plan_collapsed(block: MobileOneBlock, x: Tensor) -> Plan | None:
    """How the block is to train on x now; None: in its branches."""
    if block.collapse == "never" or not _is_ordinary(x) or isinstance(block.drop_path, DropPath):
        return None
    geometry, kind = describe(block), x.device.type
    own: torch.dtype = block.conv_kxk[0].conv.weight.dtype
    # float64 is left alone by autocast
    autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (own, x.dtype)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    height, width = geometry.output_size(*x.shape[2:])
    setting = Setting(kind, dtype, kernels=has_kernels(x, own, dtype))
    path = choose(geometry, x.shape[0] * height * width, width, setting, block.collapse)
    if path is Path.BRANCHES or not is_plain(block):
        return None
    tensors = parameters(block)
    if any(tensor.device != x.device or tensor.dtype != own for tensor in tensors):
        return None
    if own != x.dtype and not autocast:
        return None  # an error of the caller's, which the branches report
    return Plan(path, geometry, dtype, tensors)


def path_of(block: MobileOneBlock, x: Tensor) -> Path:
    """The form in which the block would train on x now."""
    plan = plan_collapsed(block, x)
    return Path.BRANCHES if plan is None else plan.path


def run_collapsed(
    block: MobileOneBlock, plan: Plan, x: Tensor, relu: bool, update_statistics: bool
) -> Tensor:
    """Train the block on x as planned.

    Args:
        block: The block.
        plan: What `plan_collapsed` gave for x.
        x: Input (N, C_in, H, W).
        relu: Rectify the output as well.
        update_statistics: Move the running statistics; not where checkpointing runs a block again.

    Returns:
        Output (N, C_out, H', W').
    """
    with torch.autocast(x.device.type, enabled=False):  # statistics and algebra stay in float32
        if plan.path is Path.GRAM:
            y, mean, var = GramConvolution.apply(x, plan.geometry, relu, plan.dtype, *plan.tensors)
        else:
            function = _KERNEL_FORMS[plan.path]
            y, mean, var = function.apply(x, plan.geometry, relu, *plan.tensors)
    if update_statistics:
        with torch.no_grad():
            update_running_statistics(block, mean, var, y.numel() // y.shape[1])
    return y


def _is_ordinary(x: Tensor) -> bool:
    """Whether x is data in memory, and nobody records or transforms what is done to it."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.ndim == 4
        and x.numel() > 0
        and x.device.type in ("cpu", "cuda")  # the algebra needs float64
        and x.dtype.is_floating_point
        and not x.is_neg()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    )
