"""Which of the exact forms a block trains in: a small cost model, and the override."""

import functools
import math
from enum import Enum
from typing import Literal, NamedTuple

import torch

from mobileone.collapsed.branches import Geometry

__all__ = ["CollapseMode", "Path", "Setting", "choose", "costs"]

CollapseMode = Literal["auto", "always", "never"]
"""`auto`: the cheapest form; `always`: the one that keeps least memory; `never`: the branches."""

# Costs are counted in multiply-adds of a matrix product, forward and backward together. Measured
# on a core of an AMD EPYC (Zen 4), where a product runs at 45 GFMA/s: 45 are a nanosecond. On CUDA
# nothing was measured: there the same table compares what goes through memory.
_NORM = 200  # an element through a BatchNorm of PyTorch and the sum of the branches
_PLANE = 120  # an input through a depthwise convolution of PyTorch
_GROUP = 1.5e5  # a channel of PyTorch's 1×1 depthwise convolution with stride 1
_PASS = 8  # an element through a pointwise operation or a kernel of ours
_UNFOLD = 60  # an element of a window matrix, written and summed back
_THIN = 600  # the same where every channel has its own, and the products are thin
_MOMENTS = 290  # an input through our depthwise kernels, half of it by vectors of a row
_CHANNEL = 4.2e5  # a channel's share in the depthwise kernels' preparations
_ENTRY = 60  # an element of the branches' kernels in the small algebra
_CALL = {"norm": 7e6, "affine": 9e7, "statistics": 1.2e8}  # overhead of a branch, and of our forms
_LANES = 16  # of a vector in our kernels


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
        kernels: Whether there are kernels of ours for this device and dtype.
    """

    device: str
    dtype: torch.dtype
    kernels: bool


def costs(geometry: Geometry, windows: int, width: int, setting: Setting) -> dict[Path, float]:
    """Multiply-adds of a training step of a block, for every form that can run it.

    Args:
        geometry: The block.
        windows: n, the number of windows: N · H' · W'.
        width: W', of the output.
        setting: Where it runs.
    """
    n, branches, window = windows, geometry.branches, geometry.window
    outputs, norms = geometry.out_chs, geometry.branches + geometry.skip
    inputs = n * geometry.in_chs * geometry.stride**2
    product = 3.0 * n * outputs * window  # one convolution
    convolution = inputs * _PLANE if geometry.depthwise else product
    table = {Path.BRANCHES: branches * convolution + norms * (n * outputs * _NORM + _CALL["norm"])}

    entries = n * geometry.groups * window  # of the window matrix
    small = branches * outputs * window * (4 * window + _ENTRY)
    table[Path.GRAM] = product + 2.0 * entries * window + small + n * outputs * 4 * _PASS
    table[Path.GRAM] += _CALL["statistics"]
    if geometry.depthwise and geometry.stride == 1:
        table[Path.BRANCHES] += outputs * _GROUP
    if not geometry.pointwise:
        table[Path.GRAM] += entries * (_THIN if geometry.depthwise else _UNFOLD)
    if setting.kernels and _is_plain_depthwise(geometry):
        filled = (1 + math.ceil(width / _LANES) * _LANES / width) / 2
        table[Path.DEPTHWISE] = inputs * filled * _MOMENTS + outputs * _CHANNEL
        table[Path.DEPTHWISE] += _CALL["statistics"]
    # one pass takes kernels, of which there are none on CUDA
    if setting.kernels and setting.device == "cpu" and geometry.pointwise and branches == 1:
        table[Path.AFFINE] = product + norms * n * outputs * 4 * _PASS + _CALL["affine"]
    return table


@functools.lru_cache(maxsize=4096)
def choose(
    geometry: Geometry, windows: int, width: int, setting: Setting, mode: CollapseMode
) -> Path:
    """Pick a block's form."""
    if mode == "never" or windows < 2:
        return Path.BRANCHES  # of one value a channel there is no variance: BatchNorm says so
    table = costs(geometry, windows, width, setting)
    if mode == "always":
        return Path.DEPTHWISE if Path.DEPTHWISE in table else Path.GRAM
    return min(table, key=table.__getitem__)


def _is_plain_depthwise(geometry: Geometry) -> bool:
    return (
        geometry.depthwise
        and geometry.kernel_size == 3
        and geometry.padding == geometry.dilation == 1
        and geometry.stride <= 2
    )
