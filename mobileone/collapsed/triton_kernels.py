"""Triton kernels of collapsed depthwise 3×3 blocks: what `native` does on a CPU, on CUDA.

The functions take and give what those of the same names in `native` do, for inputs in float32,
float16 or bfloat16. With `TRITON_INTERPRET=1` in the environment Triton runs them on a CPU.
"""

# Triton reads a kernel's annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "depthwise_careful_moments",
    "depthwise_forward",
    "depthwise_input_grad",
    "depthwise_moments",
    "depthwise_weight_grad",
]

_BLOCK = 128  # patches or pixels at a time
_TURNS = 16  # blocks that a program sums in float32, before the sums join float64 totals
_ROWS = 16  # of a tile: nine taps, a row of ones, and nothing


@triton.jit
def _tile(x, shift, channel, channels, first, count, height, width, out_height, out_width,
          STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Taps of BLOCK patches less the shift, a row a tap, and ones in row 9: (ROWS, BLOCK)."""
    patch = first + tl.arange(0, BLOCK)
    tap = tl.arange(0, ROWS)
    image = patch // (out_height * out_width)
    row = (patch // out_width % out_height * STRIDE)[None, :] + (tap // 3 - 1)[:, None]
    column = (patch % out_width * STRIDE)[None, :] + (tap % 3 - 1)[:, None]
    plane = (image.to(tl.int64) * channels + channel) * height * width
    real = (patch < count)[None, :] & (tap < 9)[:, None]
    inside = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    value = tl.load(x + plane[None, :] + row * width + column, mask=inside, other=0.0)
    value = tl.where(real, value.to(tl.float32) - shift, 0.0)
    return tl.where((patch < count)[None, :] & (tap == 9)[:, None], 1.0, value)


@triton.jit
def _moments(x, shifts, sums, channels, count, height, width, out_height, out_width,
             STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
             TURNS: tl.constexpr):  # fmt: skip
    channel, part = tl.program_id(0), tl.program_id(1)
    shift = tl.load(shifts + channel)
    total = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for turn in range(TURNS):
        tile = _tile(x, shift, channel, channels, (part * TURNS + turn) * BLOCK, count,
                     height, width, out_height, out_width, STRIDE, ROWS, BLOCK)  # fmt: skip
        total += tl.dot(tile, tl.trans(tile), input_precision="ieee")
    entry = tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(sums + (channel * tl.num_programs(1) + part) * ROWS * ROWS + entry, total)


@triton.jit
def _weight_grad(g, y, x, shifts, sums, channels, count, height, width, out_height, out_width,
                 STRIDE: tl.constexpr, RECTIFIED: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr, TURNS: tl.constexpr):  # fmt: skip
    channel, part = tl.program_id(0), tl.program_id(1)
    shift = tl.load(shifts + channel)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for turn in range(TURNS):
        first = (part * TURNS + turn) * BLOCK
        tile = _tile(x, shift, channel, channels, first, count,
                     height, width, out_height, out_width, STRIDE, ROWS, BLOCK)  # fmt: skip
        patch = first + tl.arange(0, BLOCK)
        size = out_height * out_width
        at = ((patch // size).to(tl.int64) * channels + channel) * size + patch % size
        slope = tl.load(g + at, mask=patch < count, other=0.0).to(tl.float32)
        if RECTIFIED:
            passed = tl.load(y + at, mask=patch < count, other=0.0).to(tl.float32)
            slope = tl.where(passed <= 0.0, 0.0, slope)
        total += tl.sum(tile * slope[None, :], axis=1)
    tl.store(sums + (channel * tl.num_programs(1) + part) * ROWS + tl.arange(0, ROWS), total)


@triton.jit
def _forward(x, shifts, weights, biases, y, channels, height, width, out_height, out_width,
             STRIDE: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    plane = tl.program_id(0)
    channel = plane % channels
    shift = tl.load(shifts + channel)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = pixel < out_height * out_width
    value = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(biases + channel)
    for u in tl.static_range(9):
        row = pixel // out_width * STRIDE + u // 3 - 1
        column = pixel % out_width * STRIDE + u % 3 - 1
        inside = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = plane.to(tl.int64) * height * width + row * width + column
        tap = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(weights + channel * 9 + u) * (tap - shift)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    at = plane.to(tl.int64) * out_height * out_width + pixel
    tl.store(y + at, value.to(y.dtype.element_ty), mask=real)


@triton.jit
def _input_grad(g, y, x, shifts, weights, slopes, offsets, dx, channels, height, width, out_height,
                out_width, STRIDE: tl.constexpr, RECTIFIED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    plane = tl.program_id(0)
    channel = plane % channels
    shift = tl.load(shifts + channel)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = pixel < height * width
    row, column = pixel // width, pixel % width
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    for u in tl.static_range(9):  # the patch that covers the pixel at u: Ŵ_u g + r_u
        top, left = row - (u // 3 - 1), column - (u % 3 - 1)
        covers = real & (top >= 0) & (left >= 0) & (top % STRIDE == 0) & (left % STRIDE == 0)
        covers = covers & (top // STRIDE < out_height) & (left // STRIDE < out_width)
        at = plane.to(tl.int64) * out_height * out_width
        at += top // STRIDE * out_width + left // STRIDE
        slope = tl.load(g + at, mask=covers, other=0.0).to(tl.float32)
        if RECTIFIED:
            passed = tl.load(y + at, mask=covers, other=0.0).to(tl.float32)
            slope = tl.where(passed <= 0.0, 0.0, slope)
        value += tl.load(weights + channel * 9 + u) * slope
        value += tl.where(covers, tl.load(offsets + channel * 9 + u), 0.0)
    for d in tl.static_range(25):  # the pixel at distance d: Σ_u S_{u,u+d} x, of those patches
        there, across = row + d // 5 - 2, column + d % 5 - 2
        inside = real & (there >= 0) & (there < height) & (across >= 0) & (across < width)
        at = plane.to(tl.int64) * height * width + there * width + across
        tap = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - shift
        coefficient = tl.zeros((BLOCK,), dtype=tl.float32)
        for u in tl.static_range(9):
            if (0 <= u // 3 + d // 5 - 2) & (u // 3 + d // 5 - 2 < 3):
                if (0 <= u % 3 + d % 5 - 2) & (u % 3 + d % 5 - 2 < 3):
                    top, left = row - (u // 3 - 1), column - (u % 3 - 1)
                    covers = (top >= 0) & (left >= 0)
                    covers = covers & (top % STRIDE == 0) & (left % STRIDE == 0)
                    covers = covers & (top // STRIDE < out_height) & (left // STRIDE < out_width)
                    v = 3 * (u // 3 + d // 5 - 2) + u % 3 + d % 5 - 2
                    entry = tl.load(slopes + channel * 81 + 9 * u + v)
                    coefficient += tl.where(covers, entry, 0.0)
        value += coefficient * tap
    at = plane.to(tl.int64) * height * width + pixel
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=real)


def depthwise_moments(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean (C, 9) and biased covariance (C, 9, 9), float64, of the 3×3 patches of x."""
    count, parts = _patches(x, stride)
    shift = x.mean((0, 2, 3), dtype=torch.float32)  # nothing depends on it but rounding
    sums = torch.empty(x.shape[1], parts, _ROWS, _ROWS, dtype=torch.float32, device=x.device)
    _launch(_moments, sums.shape[:2], x, shift, sums, x.shape[1], count, *_sizes(x, stride),
            STRIDE=stride, ROWS=_ROWS, BLOCK=_BLOCK, TURNS=_TURNS)  # fmt: skip
    total = sums.sum(1, dtype=torch.float64) / count
    mean = total[:, 9, :9]
    cov = total[:, :9, :9] - mean[:, :, None] * mean[:, None, :]
    return mean + shift[:, None].double(), cov


def depthwise_careful_moments(
    x: Tensor, stride: int, which: Tensor, mean: Tensor, cov: Tensor
) -> None:
    """Write the same, summed in float64, for the channels of indices `which`."""
    for channel in which.tolist():  # one by one: patches in float64 are 18 times the plane
        plane = x[:, channel : channel + 1].double()
        patches = F.unfold(plane, 3, padding=1, stride=stride).transpose(0, 1).flatten(1)
        mean[channel] = patches.mean(1)
        patches = patches - mean[channel, :, None]
        cov[channel] = patches @ patches.T / patches.shape[1]


def depthwise_forward(
    x: Tensor, stride: int, shift: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    """Convolve x − shift with weight (C, 9) and bias (C), and rectify on demand.

    The padding is 0 − shift; shift is (C,), float32.
    """
    sizes = _sizes(x, stride)
    y = x.new_empty(*x.shape[:2], *sizes[2:])
    grid = (x.shape[0] * x.shape[1], triton.cdiv(sizes[2] * sizes[3], _BLOCK))
    _launch(_forward, grid, x, shift, _narrow(weight), _narrow(bias), y, x.shape[1], *sizes,
            STRIDE=stride, RELU=relu, BLOCK=_BLOCK)  # fmt: skip
    return y


def depthwise_weight_grad(
    g: Tensor, y: Tensor | None, x: Tensor, stride: int, mean: Tensor, ill_conditioned: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ g (x − m) (C, 9) and Σ g (C), float64, over the patches; m is (C, 9), float64.

    Here ill-conditioned channels are summed as all are.
    """
    count, parts = _patches(x, stride)
    shift = mean[:, 4].float().contiguous()
    sums = torch.empty(x.shape[1], parts, _ROWS, dtype=torch.float32, device=x.device)
    _launch(_weight_grad, sums.shape[:2], g, g if y is None else y, x, shift, sums, x.shape[1],
            count, *_sizes(x, stride), STRIDE=stride, RECTIFIED=y is not None, ROWS=_ROWS,
            BLOCK=_BLOCK, TURNS=_TURNS)  # fmt: skip
    total = sums.sum(1, dtype=torch.float64)
    bias_grad = total[:, 9]
    rest = mean - shift[:, None].double()
    return total[:, :9] - bias_grad[:, None] * rest, bias_grad


def depthwise_input_grad(
    g: Tensor,
    y: Tensor | None,
    x: Tensor,
    stride: int,
    weight: Tensor,
    slope: Tensor,
    offset: Tensor,
    shift: Tensor,
) -> Tensor:
    """∂L/∂x; a patch x receives slope · (x − shift) + offset in addition to Ŵᵀg.

    Slope (C, 9, 9) and offset (C, 9) are in float64, shift (C,) in float32.
    """
    dx = torch.empty_like(x)
    grid = (x.shape[0] * x.shape[1], triton.cdiv(x.shape[2] * x.shape[3], _BLOCK))
    _launch(_input_grad, grid, g, g if y is None else y, x, shift, _narrow(weight),
            _narrow(slope), _narrow(offset), dx, x.shape[1], *_sizes(x, stride), STRIDE=stride,
            RECTIFIED=y is not None, BLOCK=_BLOCK)  # fmt: skip
    return dx


def _launch(
    kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **constants: Any
) -> None:
    with torch.cuda.device_of(x):  # not the current device where there are several
        kernel[tuple(grid)](x, *arguments, **constants)


def _narrow(small: Tensor) -> Tensor:
    return small.to(torch.float32).contiguous()


def _sizes(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    height, width = x.shape[2:]
    return height, width, (height - 1) // stride + 1, (width - 1) // stride + 1


def _patches(x: Tensor, stride: int) -> tuple[int, int]:
    """Patches a channel, and the parts in which programs sum them."""
    sizes = _sizes(x, stride)
    count = x.shape[0] * sizes[2] * sizes[3]
    return count, triton.cdiv(count, _BLOCK * _TURNS)
