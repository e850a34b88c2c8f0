"""Which of the exact forms a block trains in: a small cost model, and the override."""

import functools
import math
from enum import Enum
from typing import NamedTuple

import torch

from mobileone.collapsed.branches import CollapseMode, Geometry

__all__ = ["Path", "Setting", "choose", "costs", "runnable"]

# Costs are counted in multiply-adds of a matrix product, forward and backward together. Measured
# on a core of an AMD EPYC (Zen 4), where a product runs at 45 GFMA/s: 45 are a nanosecond.
_PASS = 8  # an element through a pointwise operation or one of our kernels
_UNFOLD = 60  # an element of a patch matrix, written and summed back
_THIN = 600  # the same where every channel has its own, and the products are thin
_MOMENTS = 290  # an input through our depthwise kernels, half of it by vectors of a row
_CHANNEL = 4.2e5  # a channel's share in the depthwise kernels' preparations
_ENTRY = 60  # an element of the branches' kernels in the small algebra
_CALL = {"norm": 7e6, "affine": 9e7, "statistics": 1.2e8}  # overhead of a branch, and of our forms
_LANES = 16  # of a vector in our kernels
_TURN = 100  # an element from channels-last to planes, or back
_STACK = 4  # BatchNorms from which one convolution of all branches launches fewer kernels
_CASTS = 1.3  # times the Gram form's cost in bfloat16, where statistics and gradients are float32


class _Rates(NamedTuple):
    """What the branches cost in PyTorch.

    Attributes:
        product: A multiply-add of a product.
        norm: An element through a BatchNorm and the sum of the branches.
        plane: An input through a depthwise convolution.
        group: A channel of the 1×1 depthwise convolution with stride 1.
    """

    product: float
    norm: float
    plane: float
    group: float


_PLANES, _CHANNELS_LAST = _Rates(1.0, 200, 120, 1.5e5), _Rates(1.0, 112, 78, 0)
# on processors with bfloat16 products
_PLANES_BF16, _CHANNELS_LAST_BF16 = _Rates(0.6, 120, 80, 1.5e5), _Rates(0.6, 65, 75, 0)
# a strided depthwise convolution in bfloat16 leaves oneDNN's fast paths: an input, and a plane
_STRIDED_BF16, _STRIDED_PLANE_BF16 = 450, 1.2e5


class Path(Enum):
    """The exact forms; the value describes what they do."""

    BRANCHES = "every branch with its own BatchNorm"
    GRAM = "one convolution, statistics from the Gram matrix of its patches"
    DEPTHWISE = "one depthwise convolution, statistics from the moments of its patches"
    AFFINE = "one convolution and one affine pass, statistics from the convolution's output"
    STACKED = "one convolution and one BatchNorm for all branches, computed again backwards"


class Setting(NamedTuple):
    """Where a block runs.

    Attributes:
        device: Device type.
        dtype: Dtype of the convolution.
        kernels: Whether we have kernels for this dtype; on a CPU only.
        channels_last: Whether the input is in channels-last on a CPU, where it matters.
    """

    device: str
    dtype: torch.dtype
    kernels: bool
    channels_last: bool = False


def costs(geometry: Geometry, patches: int, width: int, setting: Setting) -> dict[Path, float]:
    """Multiply-adds of a training step of a block, for every form that can run it.

    Args:
        geometry: The block.
        patches: n, the number of patches: N · H' · W'.
        width: W', of the output.
        setting: Where it runs.
    """
    n, branches, patch = patches, geometry.branches, geometry.patch
    outputs, norms = geometry.out_chs, geometry.branches + geometry.skip
    inputs = n * geometry.in_chs * geometry.stride**2
    product = 3.0 * n * outputs * patch  # one convolution
    narrow = setting.device == "cpu" and setting.dtype == torch.bfloat16 and _multiplies_bf16()
    rates = _rates(setting.channels_last, narrow)
    convolution = rates.product * product
    if geometry.depthwise:
        an_input = rates.plane
        if narrow and geometry.stride > 1:
            an_input = _STRIDED_BF16 + _STRIDED_PLANE_BF16 / (geometry.stride * width) ** 2
        convolution = inputs * an_input
    norm = n * outputs * rates.norm + _CALL["norm"]
    table = {Path.BRANCHES: branches * convolution + norms * norm}

    entries = n * geometry.groups * patch  # of the patch matrix
    small = branches * outputs * patch * (4 * patch + _ENTRY)
    table[Path.GRAM] = product + 2.0 * entries * patch + small + n * outputs * 4 * _PASS
    table[Path.GRAM] += _CALL["statistics"]
    if geometry.depthwise and geometry.stride == 1:
        table[Path.BRANCHES] += outputs * rates.group
    if not geometry.pointwise:
        table[Path.GRAM] += entries * (_THIN if geometry.depthwise else _UNFOLD)
    table[Path.GRAM] *= _CASTS if narrow else 1
    if setting.kernels and _is_plain_depthwise(geometry):
        filled = (1 + math.ceil(width / _LANES) * _LANES / width) / 2
        table[Path.DEPTHWISE] = inputs * filled * _MOMENTS + outputs * _CHANNEL
        table[Path.DEPTHWISE] += _CALL["statistics"]
    if setting.kernels and geometry.pointwise and branches == 1:
        table[Path.AFFINE] = product + norms * n * outputs * 4 * _PASS + _CALL["affine"]
    if setting.channels_last:  # the forms turn input and output to planes, and gradients back
        turns = 2 * _TURN * (inputs + n * outputs)
        table = {path: cost + turns * (path is not Path.BRANCHES) for path, cost in table.items()}
    return table


@functools.lru_cache(maxsize=4096)
def choose(
    geometry: Geometry, patches: int, width: int, setting: Setting, mode: CollapseMode
) -> Path:
    """Pick a block's form.

    On CUDA it is the branches, as the table's constants are a CPU's; `always` stacks them there,
    where that launches fewer kernels than they do.
    """
    if mode == "never" or patches < 2:
        return Path.BRANCHES  # one value a channel has no variance: BatchNorm raises
    if setting.device == "cuda":
        stacks = mode == "always" and _can_stack(geometry) and geometry.norms >= _STACK
        return Path.STACKED if stacks else Path.BRANCHES
    table = costs(geometry, patches, width, setting)
    if mode == "always":
        return Path.DEPTHWISE if Path.DEPTHWISE in table else Path.GRAM
    best = Path.BRANCHES
    for path, cost in table.items():  # under a compiler costs are symbols, which `min` cannot order
        if cost < table[best]:
            best = path
    return best


@functools.lru_cache(maxsize=4096)
def runnable(geometry: Geometry, patches: int, width: int, setting: Setting) -> tuple[Path, ...]:
    """The collapsed forms that can run a block; on CUDA those that never wait for the device."""
    if patches < 2:
        return ()
    on_cpu = costs(geometry, patches, width, setting) if setting.device == "cpu" else ()
    stacked = (Path.STACKED,) if _can_stack(geometry) else ()
    return (*(path for path in on_cpu if path is not Path.BRANCHES), *stacked)


def _can_stack(geometry: Geometry) -> bool:
    return len(set(geometry.eps)) == 1  # as one BatchNorm has one ε


def _rates(channels_last: bool, narrow: bool) -> _Rates:
    if narrow:
        return _CHANNELS_LAST_BF16 if channels_last else _PLANES_BF16
    return _CHANNELS_LAST if channels_last else _PLANES


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiplies_bf16() -> bool:
    """Whether this processor multiplies bfloat16 at all; others take float32 for it, slower."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())


def _is_plain_depthwise(geometry: Geometry) -> bool:
    return (
        geometry.depthwise
        and geometry.kernel_size == 3
        and geometry.padding == geometry.dilation == 1
        and geometry.stride <= 2
    )
