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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _reduce_mean(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    return x.mean(dim=axes, keepdim=keep_dims)


def _reduce_max(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    return x.amax(dim=axes, keepdim=keep_dims)


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


def _lut_to_dense(indices: Tensor, lut: Tensor, shape: list[int]) -> Tensor:
    """Indices packed in bytes, lowest bits first, into a table of 2^bits values."""
    bits = (lut.numel() - 1).bit_length()
    count = int(torch.tensor(shape).prod())
    unpacked = (indices.reshape(-1, 1).int() >> torch.arange(8)) & 1  # (bytes, 8)
    digits = unpacked.reshape(-1)[: count * bits].reshape(count, bits)
    positions = (digits << torch.arange(bits)).sum(dim=1)
    return lut.reshape(-1)[positions].reshape(shape)


KERNELS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "gelu": _gelu,
    "identity": lambda x: x,
    "linear": _linear,
    "matmul": _matmul,
    "mul": lambda x, y: x * y,
    "reduce_max": _reduce_max,
    "reduce_mean": _reduce_mean,
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "sigmoid": lambda x: x.sigmoid(),
    "softmax": lambda x, axis: x.softmax(dim=axis),
    "squeeze": lambda x, axes: x.squeeze(axes),
    "sub": lambda x, y: x - y,
}
