"""Which of the exact forms a block trains in: a small cost model, and the override."""

import functools
import logging
from enum import Enum
from typing import Literal, NamedTuple

import torch

from mobileone.collapsed.branches import Geometry

__all__ = ["CollapseMode", "Path", "Setting", "choose", "costs"]

log = logging.getLogger(__name__)

CollapseMode = Literal["auto", "always", "never"]
"""`auto`: the cheapest form; `always`: the one that keeps least memory; `never`: the branches."""

# Costs are counted in multiply-adds of a matrix product, forward and backward together. Measured
# on 2 cores of an AMD EPYC (Zen 4), where a product runs at 90 GFMA/s.
_NORM = 110  # an element through a BatchNorm of PyTorch
_PASS = 8  # an element through a pointwise operation or a kernel of ours
_UNFOLD = 30  # an element of a window matrix, written and summed back
_PLANE = 40  # an element through a depthwise convolution


class Path(Enum):
    """The exact forms; the value says what they do."""

    BRANCHES = "every branch with its own BatchNorm"
    GRAM = "one convolution, statistics from the Gram matrix of its windows"
    DEPTHWISE = "one depthwise convolution, statistics from the moments of its windows"
    AFFINE = "one convolution and one affine pass, statistics from the convolution's output"


class Setting(NamedTuple):
    """Where a block runs.

    Attributes:
        device: Device type.
        dtype: Dtype of the convolution.
        native: Whether the CPU kernels are at hand for this device and dtype.
    """

    device: str
    dtype: torch.dtype
    native: bool


def costs(geometry: Geometry, windows: int, setting: Setting) -> dict[Path, float]:
    """Multiply-adds of a training step of a block, for every form that can run it.

    Args:
        geometry: The block.
        windows: n, the number of windows: N · H' · W'.
        setting: Where it runs.
    """
    n, branches, window = windows, geometry.branches, geometry.window
    outputs, out_group = geometry.out_chs, geometry.out_chs // geometry.groups
    product = n * outputs * window  # one convolution, one way
    norms = branches + geometry.skip
    convolution = 3.0 * product
    if geometry.depthwise:
        convolution = max(convolution, n * outputs * _PLANE * geometry.stride**2)
    table = {Path.BRANCHES: branches * convolution + norms * n * outputs * _NORM}

    entries = n * geometry.groups * window  # of the window matrix
    small = 3.0 * branches * outputs * window**2  # T = W C, its gradient's and that of C
    table[Path.GRAM] = 3.0 * product + 2.0 * entries * window + small + n * outputs * 4 * _PASS
    if not geometry.pointwise:
        table[Path.GRAM] += entries * _UNFOLD
    if out_group == 1:  # a product of thin matrices: bound by reading them
        table[Path.GRAM] += entries * 4 * _PASS
    if setting.native and _is_plain_depthwise(geometry):
        table[Path.DEPTHWISE] = n * outputs * geometry.stride**2 * _PLANE
    if setting.native and geometry.pointwise and branches == 1:
        table[Path.AFFINE] = 3.0 * product + norms * n * outputs * 4 * _PASS
    return table


@functools.lru_cache(maxsize=4096)
def choose(geometry: Geometry, windows: int, setting: Setting, mode: CollapseMode) -> Path:
    """Pick a block's form, and say once in the log which one it is."""
    table = costs(geometry, windows, setting)
    if mode == "never" or windows < 2:
        path = Path.BRANCHES  # of one value a channel there is no variance: BatchNorm says so
    elif mode == "always":
        path = Path.DEPTHWISE if Path.DEPTHWISE in table else Path.GRAM
    else:
        path = min(table, key=table.__getitem__)
    log.info(
        "collapse=%s: %d→%d, %d×%d, stride %d, %d groups, %d branches, %d windows on %s (%s): %s",
        *(mode, geometry.in_chs, geometry.out_chs, geometry.kernel_size, geometry.kernel_size),
        *(geometry.stride, geometry.groups, geometry.branches, windows),
        *(setting.device, str(setting.dtype).removeprefix("torch."), path.value),
    )
    return path


def _is_plain_depthwise(geometry: Geometry) -> bool:
    return (
        geometry.depthwise
        and geometry.kernel_size == 3
        and geometry.padding == geometry.dilation == 1
        and geometry.stride <= 2
    )
