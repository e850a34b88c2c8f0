"""The fastest form of a block by trial: forward and backward on the real input, without a trace."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mobileone.collapsed.branches import BranchedBlock, is_hooked, parameters, with_parts
from mobileone.collapsed.choices import keep, kept
from mobileone.collapsed.cost_model import Path

if TYPE_CHECKING:
    from mobileone.collapsed.dispatch import Plan

__all__ = ["fastest", "seconds"]

log = logging.getLogger(__name__)

_ROUNDS = 5  # timed, of which the median counts; one more comes first, in which libraries set up
_MARGIN = 0.9  # of the branches' time: what a form may take to be worth leaving them
_SIZES = 32  # inputs of a shape of blocks that are tried: images of ever new sizes cost more

# blocks that were tried, and their forms, since the last report
_fresh: list[tuple[int, Path]] = []
_tried: Counter[str] = Counter()


def fastest(block: BranchedBlock, x: Tensor, plans: Sequence[Plan]) -> Plan | None:
    """The form that was fastest on such a block and input, in a trial now if there was none.

    There is no trial where the pass is not a training step's own: while a compiler or a CUDA graph
    records it, in a backward pass, or where gradients are off or watched. There it is the branches.

    Args:
        block: The block; it stays as it is.
        x: Input (N, C_in, H, W).
        plans: The collapsed forms that can run it.

    Returns:
        One of the plans; None: the branches.
    """
    compiling = torch.compiler.is_compiling()
    if not plans or (compiling and not _sizes_are_known(x)):
        return None
    shape, key = _describe(plans[0], x)
    forms = {Path.BRANCHES.name: None, **{plan.path.name: plan for plan in plans}}
    name = kept(x.device, key)
    if name not in forms:
        if compiling or not _may_try(block, x, plans[0].tensors):
            return None
        name = _try(block, x, plans, shape, key)
    elif not compiling and _fresh and _fresh[0][0] == id(block):
        _report(x.device)  # a step has passed
    return forms[name]


def _try(block: BranchedBlock, x: Tensor, plans: Sequence[Plan], shape: str, key: str) -> str:
    _tried[shape] += 1
    times = _times(block, x, plans) if _tried[shape] <= _SIZES else {}
    best = min(times, key=times.__getitem__, default=Path.BRANCHES)
    if times and times[best] > _MARGIN * times.get(Path.BRANCHES, math.inf):
        best = Path.BRANCHES
    keep(x.device, key, best.name, for_others=len(times) == 1 + len(plans))
    _fresh.append((id(block), best))
    return best.name


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes on a device that is idle before; on CUDA by the device's own clock."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def _sizes_are_known(x: Tensor) -> bool:
    """Whether a compiler leaves no size open: to ask for one would compile again for each."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes a second

    return all(has_static_value(size) for size in x.shape)


def _describe(plan: Plan, x: Tensor) -> tuple[str, str]:
    """A block's shape, and with its input all that decides how long it takes, in words."""
    g = plan.geometry
    shape = (
        f"{g.branches}x {g.in_chs}->{g.out_chs} k{g.kernel_size} s{g.stride} p{g.padding} "
        f"d{g.dilation} g{g.groups} skip{int(g.skip)} in {plan.dtype}"
    )
    batch, channels, height, width = x.shape
    planes = [int(t.is_contiguous()) for t in (x, plan.tensors[0])]
    wanted = [int(t.requires_grad) for t in (x, *plan.tensors)]
    key = f"{batch}x{channels}x{height}x{width} {x.dtype}, planes {planes}, gradients {wanted}"
    return shape, f"{shape} on {key}"


def _may_try(block: BranchedBlock, x: Tensor, tensors: list[Tensor]) -> bool:
    parts = with_parts(list(block._modules.values()))
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(type(tensor) is nn.Parameter for tensor in tensors)  # leaves, not a replica's
        and torch._C._current_graph_task_id() == -1
        and not torch.is_anomaly_enabled()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        and not any(map(is_hooked, parts))
    )


def _times(block: BranchedBlock, x: Tensor, plans: Sequence[Plan]) -> dict[Path, float]:
    """Seconds of each form, in turns; without those that fail, as where memory is short."""
    times: dict[Path, list[float]] = {Path.BRANCHES: [], **{plan.path: [] for plan in plans}}
    x = x.detach().requires_grad_(x.requires_grad)
    with _no_trace(x):
        for _ in range(1 + _ROUNDS):
            for plan in (None, *plans):
                path = Path.BRANCHES if plan is None else plan.path
                if path not in times:
                    continue
                try:
                    times[path].append(seconds(partial(_step, _twin(block), plan, x), x.device))
                except Exception as error:  # an allocator's, a library's, a kernel's
                    log.info("collapse: left out: %s: %s", path.value, error)
                    del times[path]
    return {path: statistics.median(taken[1:]) for path, taken in times.items()}


def _step(twin: BranchedBlock, plan: Plan | None, x: Tensor) -> None:
    own = parameters(twin)
    y = twin.train_as(None if plan is None else plan._replace(tensors=own), x)
    wanted = [tensor for tensor in (x, *own) if tensor.requires_grad]
    with torch.autocast(x.device.type, enabled=False):
        torch.autograd.grad(y, wanted, y.detach())  # any gradient takes as long


@contextmanager
def _no_trace(x: Tensor) -> Iterator[None]:
    """Leave random numbers as they are, and keep the trial from checkpointing and autocast."""
    kind = x.device.type
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[x.device] if x.is_cuda else []))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _twin(module: Any) -> Any:
    """A module with the same parameter values, as leaves of its own, and copies of the buffers."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    twin._buffers = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    twin._modules = {
        name: None if part is None else _twin(part) for name, part in module._modules.items()
    }
    return twin


def _report(device: torch.device) -> None:
    """One line when all blocks have been tried."""
    counts = Counter(path for _, path in _fresh)
    chosen = ", ".join(f"{number} × {path.value}" for path, number in counts.most_common())
    log.info("collapse: %d shapes of blocks measured on %s: %s", len(_fresh), device, chosen)
    _fresh.clear()
