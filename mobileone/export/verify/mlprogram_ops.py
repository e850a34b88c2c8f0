"""The operations of Core ML's ML programs that these networks use, written again in PyTorch.

Every function takes an operation's arguments by the names of Apple's MIL specification and returns
its output, computed in float32. `KERNELS` is the table: what is not in it is not known.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KERNELS"]


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: list[int],
    pad_type: str,
    pad: list[int],
    dilations: list[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    if pad_type == "custom":
        top, bottom, left, right = pad
        x = F.pad(x, (left, right, top, bottom))
    elif pad_type != "valid":
        raise NotImplementedError(f"pad_type {pad_type!r}")
    return F.conv2d(x, weight, bias, strides, 0, dilations, groups)


def _batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _gelu(x: Tensor, mode: str) -> Tensor:
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise NotImplementedError(f"mode {mode!r}")
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _cast(x: Tensor, dtype: str) -> Tensor:
    if dtype not in ("fp16", "fp32"):  # the rounding is that of the output's stated type
        raise NotImplementedError(f"dtype {dtype!r}")
    return x


def _matmul(x: Tensor, y: Tensor, transpose_x: bool, transpose_y: bool) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    """`scale * (data - zero_point)`, both of them along `axis` or of one value."""
    shape = [-1 if i == axis else 1 for i in range(quantized_data.ndim)]
    data, zero = quantized_data.float(), torch.as_tensor(zero_point).float().reshape(-1)
    factor = torch.as_tensor(scale).float().reshape(-1)
    return (data - zero.view(shape)) * factor.view(shape)


def _blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`scale * (data - offset)`, both of one value a block of equal size along each axis."""
    shifted, factor = data.float(), scale.float()
    if offset is not None:
        shifted = shifted - _for_blocks(offset.float(), shifted)
    return _for_blocks(factor, shifted) * shifted


def _for_blocks(values: Tensor, data: Tensor) -> Tensor:
    for axis, (blocks, size) in enumerate(zip(values.shape, data.shape, strict=True)):
        values = values.repeat_interleave(size // blocks, axis)
    return values


_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def _quantize(
    input: Tensor,
    scale: Any,
    output_dtype: str,
    zero_point: Any = 0,
    axis: int | None = None,
) -> Tensor:
    """`clip(round(input / scale) + zero_point)`, ties to even: whole numbers, as floats."""
    if output_dtype not in _RANGES:
        raise NotImplementedError(f"output_dtype {output_dtype!r}")
    codes = (input / _along(scale, input, axis)).round() + _along(zero_point, input, axis)
    return codes.clamp(*_RANGES[output_dtype])


def _dequantize(input: Tensor, scale: Any, zero_point: Any = 0, axis: int | None = None) -> Tensor:
    """`scale * (input - zero_point)`."""
    return _along(scale, input, axis) * (input.float() - _along(zero_point, input, axis))


def _along(values: Any, like: Tensor, axis: int | None) -> Tensor:
    """One value, or one for each position along an axis, to be broadcast to a tensor."""
    found = torch.as_tensor(values).float()
    if axis is None or found.numel() == 1:
        return found.reshape(())
    return found.reshape([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def _lut_to_dense(indices: Tensor, lut: Tensor, shape: list[int] | None = None) -> Tensor:
    """Indices into a table of 2^bits values; with a shape packed in bytes, lowest bits first."""
    if shape is None:  # from iOS 18 on, where each block might have a table of vectors
        if lut.numel() != lut.shape[-2]:
            raise NotImplementedError(f"tables of the shape {tuple(lut.shape)}")
        return lut.flatten()[indices.long()]
    bits = (lut.numel() - 1).bit_length()
    count = int(torch.tensor(shape).prod())
    unpacked = (indices.reshape(-1, 1).int() >> torch.arange(8)) & 1  # (bytes, 8)
    digits = unpacked.reshape(-1)[: count * bits].reshape(count, bits)
    positions = (digits << torch.arange(bits)).sum(dim=1)
    return lut.reshape(-1)[positions].reshape(shape)


def _concat(values: list[Tensor], axis: int, interleave: bool) -> Tensor:
    if interleave:
        raise NotImplementedError("interleave")
    return torch.cat(values, axis)


def _slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """A masked bound is open; a squeezed axis is the one at its begin."""
    ranges = zip(
        begin,
        end,
        begin_mask or [False] * x.ndim,
        end_mask or [False] * x.ndim,
        squeeze_mask or [False] * x.ndim,
        strict=True,
    )
    return x[
        tuple(
            low if squeezed else slice(None if from_start else low, None if to_end else high)
            for low, high, from_start, to_end, squeezed in ranges
        )
    ]


def _upsample(mode: str) -> Callable[..., Tensor]:
    def upsample(
        x: Tensor,
        scale_factor_height: float,
        scale_factor_width: float,
        align_corners: bool | None = None,
    ) -> Tensor:
        size = [round(x.shape[-2] * scale_factor_height), round(x.shape[-1] * scale_factor_width)]
        return F.interpolate(x, size, mode=mode, align_corners=align_corners)

    return upsample


KERNELS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": _concat,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "dequantize": _dequantize,
    "exp": lambda x: x.exp(),
    "gelu": _gelu,
    "identity": lambda x: x,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "minimum": lambda x, y: torch.minimum(x, torch.as_tensor(y)),
    "mul": lambda x, y: x * y,
    "quantize": _quantize,
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes, keep_dims),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "slice_by_index": _slice_by_index,
    "softmax": lambda x, axis: x.softmax(dim=axis),
    "squeeze": lambda x, axes: x.squeeze(axes),
    "sub": lambda x, y: x - y,
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0),
    "transpose": lambda x, perm: x.permute(perm),
    "upsample_bilinear": _upsample("bilinear"),
    "upsample_nearest_neighbor": _upsample("nearest"),
}
