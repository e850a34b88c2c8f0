"""The training path of a block: pick an exact form, run it, move the running statistics."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="union-attr,assignment,arg-type"

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mobileone.collapsed.branches import (
    BranchedBlock,
    CollapseMode,
    Geometry,
    describe,
    parameters,
    unsupported_reason,
    update_running_statistics,
)
from mobileone.collapsed.cost_model import Path, Setting, choose, runnable
from mobileone.collapsed.depthwise import has_kernels
from mobileone.collapsed.functions import CollapsedConvolution
from mobileone.collapsed.trial import fastest

__all__ = ["Plan", "log_path_once", "path_of", "plan_collapsed", "run_collapsed"]

log = logging.getLogger(__name__)

_STRANGE = "an input that is recorded, transformed, or not plain data of four dimensions"


class Plan(NamedTuple):
    """A block's collapsed form for one batch.

    Attributes:
        path: The form; not the branches.
        geometry: The block's shape.
        dtype: Of the convolution.
        tensors: Its `parameters`.
        to_channels_last: Whether the output goes back to channels-last.
    """

    path: Path
    geometry: Geometry
    dtype: torch.dtype
    tensors: list[Tensor]
    to_channels_last: bool


def plan_collapsed(block: BranchedBlock, x: Tensor) -> Plan | None:
    """How the block is to train on x now; None: in its branches. Logged once a shape."""
    plan = _plan(block, x)
    if not torch.compiler.is_compiling() and log.isEnabledFor(logging.INFO):
        _log_path(block, x, plan)
    return plan if isinstance(plan, Plan) else None


def path_of(block: BranchedBlock, x: Tensor) -> Path:
    """The form in which the block would train on x now."""
    plan = _plan(block, x)
    return plan.path if isinstance(plan, Plan) else Path.BRANCHES


def _plan(block: BranchedBlock, x: Tensor) -> Plan | str:
    """The block's plan for x, or why it has none."""
    if not _is_ordinary(x):
        return _STRANGE
    if block.collapse == "never":
        return "as set"
    reason = unsupported_reason(block)
    if reason is not None:
        return reason
    tensors = parameters(block)
    own, kind = tensors[0].dtype, x.device.type
    buffers = (b for norm in block.norms() for b in (norm.running_mean, norm.running_var))
    if not all(map(_is_plain_data, (*tensors, *buffers))):
        return "parameters or buffers that are not plain tensors"
    if any(tensor.device != x.device or tensor.dtype != own for tensor in tensors):
        return "parameters of several dtypes, or on another device"
    # float64 is left alone by autocast
    autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (own, x.dtype)
    if own != x.dtype and not autocast:
        return "an input of another dtype"  # an error of the caller's, which the branches report
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    geometry = describe(block)
    height, width = geometry.output_size(*x.shape[2:])
    setting = Setting(kind, dtype, has_kernels(x, own, dtype), _is_channels_last(x))
    asked = (geometry, x.shape[0] * height * width, width, setting)
    # with kernels all of a network collapses, and stays in planes; else its depthwise blocks do not
    to_channels_last = setting.channels_last and not setting.kernels
    plan = functools.partial(
        Plan, geometry=geometry, dtype=dtype, tensors=tensors, to_channels_last=to_channels_last
    )
    compiling = torch.compiler.is_compiling()  # sizes are symbols there, which nothing may keep
    if _is_measured(block.collapse, kind):
        paths = (runnable.__wrapped__ if compiling else runnable)(*asked)
        return fastest(block, x, [plan(path) for path in paths]) or "the fastest that is known"
    path = (choose.__wrapped__ if compiling else choose)(*asked, block.collapse)
    return "the cheapest" if path is Path.BRANCHES else plan(path)


def _is_measured(mode: CollapseMode, device: str) -> bool:
    """Whether a trial decides. On CUDA it does, unless runs are to be the same each time."""
    on_cuda = mode == "auto" and device == "cuda"
    return mode == "measured" or (on_cuda and not torch.are_deterministic_algorithms_enabled())


def _log_path(block: BranchedBlock, x: Tensor, plan: Plan | str) -> None:
    conv = block.conv_kxk[0].conv
    shape = f"{len(block.conv_kxk)} × {type(conv).__name__}({conv.extra_repr()})"
    form = plan.path.value if isinstance(plan, Plan) else f"{Path.BRANCHES.value} ({plan})"
    if plan is not _STRANGE:  # whose size may be a symbol
        dtype = plan.dtype if isinstance(plan, Plan) else x.dtype
        size = "×".join(map(str, x.shape))
        shape += f" on {size}, {x.device.type}, {str(dtype).removeprefix('torch.')}"
    log_path_once(block.collapse, shape, form)


@functools.lru_cache(maxsize=4096)
def log_path_once(mode: CollapseMode, shape: str, form: str) -> None:
    """Log a decision, if it is new."""
    log.info("collapse=%s: %s: %s", mode, shape, form)


def run_collapsed(
    block: BranchedBlock, plan: Plan, x: Tensor, relu: bool, update_statistics: bool
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
        y, mean, var = CollapsedConvolution.apply(
            x, plan.path, plan.geometry, relu, plan.dtype, *plan.tensors
        )
    if update_statistics:
        with torch.no_grad():
            update_running_statistics(block, mean, var, y.numel() // y.shape[1])
    return y.contiguous(memory_format=torch.channels_last) if plan.to_channels_last else y


def _is_ordinary(x: Tensor) -> bool:
    """Whether x is data in memory, and nothing but a compiler records what is done to it."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and _is_image(x)
    return (
        _is_plain_data(x)
        and not torch.jit.is_tracing()
        and _is_image(x)
        and forward_ad._current_level < 0  # forward-mode derivatives know the branches only
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    )


def _is_image(x: Tensor) -> bool:
    """Whether x is a batch of images that the forms can train on."""
    on_device = x.device.type in ("cpu", "cuda")  # the algebra needs float64
    return x.ndim == 4 and x.numel() > 0 and on_device and x.dtype.is_floating_point


def _is_channels_last(x: Tensor) -> bool:
    """Whether x is in channels-last on a CPU, and not in both layouts, as one channel is."""
    if x.device.type != "cpu" or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def _is_plain_data(tensor: Tensor) -> bool:
    """Whether memory has the values: not a subclass with data elsewhere, no lazy negation."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return torch.compiler.is_compiling() or not tensor.is_neg()  # operators resolve it
