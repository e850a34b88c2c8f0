"""Layers of integers: what a quantized network ships, and what its files are written from.

A layer computes in float32 what an integer kernel computes: its input is rounded to 256 steps, its
weights are integers times one scale an output channel. The operators are those that `torch.export`
keeps and that the converters of ONNX, ExecuTorch, Core ML and LiteRT turn into integer kernels.
"""

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from mobileone.quantization.rounding import Scheme

__all__ = [
    "DequantizeWeight",
    "QuantizeDequantize",
    "QuantizedConv2d",
    "QuantizedLinear",
    "round_bias",
]

_Q = torch.ops.quantized_decomposed
_LIMIT = 2**31 - 1  # of a bias, in steps of input scale times weight scale


class QuantizeDequantize(nn.Module):
    """Round to 256 steps: scale (clamp(round(x / scale) + zero_point, 0, 255) - zero_point).

    Args:
        scale: The step, positive.
        zero_point: The code of zero, 0..255.
        signed: Count codes from -128: the same numbers in int8, which some runtimes ask for.

    Raises:
        ValueError: An argument breaks a rule above.
    """

    def __init__(self, scale: float, zero_point: int = 0, signed: bool = False) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"`scale` (={scale}) must be positive and finite")
        if not 0 <= zero_point <= 255:
            raise ValueError(f"`zero_point` (={zero_point}) must be in 0..255")
        # numbers, not buffers: the converters want them as constants of the graph
        self.scale, self.zero_point, self.signed = float(scale), int(zero_point), signed

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, float32, to the same."""
        shift, dtype = (128, torch.int8) if self.signed else (0, torch.uint8)
        grid = (self.scale, self.zero_point - shift, -shift, 255 - shift, dtype)
        return _Q.dequantize_per_tensor(_Q.quantize_per_tensor(x, *grid), *grid)

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        return f"scale={self.scale:.4g}, zero_point={self.zero_point}"


class DequantizeWeight(nn.Module):
    """Integers to numbers, with one scale an output channel."""

    def forward(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """(C_out, ...) int8, (C_out,) and (C_out,) -> (C_out, ...) float32."""
        return _Q.dequantize_per_channel(weight, scale, zero, 0, -128, 127, torch.int8)


def _fits(weight: Tensor, scheme: Scheme) -> bool:
    if scheme == "palette4":
        return len(weight.unique()) <= 16
    return scheme == "int8" or bool(((weight >= -8) & (weight <= 7)).all())


class _QuantizedLayer(nn.Module):
    """Integer weights, one scale an output channel, and the grids of input and output."""

    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor,
        input: QuantizeDequantize,
        output: nn.Module | None = None,
        scheme: Scheme = "int8",
    ) -> None:
        super().__init__()
        if weight.dtype != torch.int8 or not _fits(weight, scheme):
            raise ValueError(f"`weight` must be int8 with values of the `scheme` {scheme!r}")
        if not (weight_scale > 0).all() or len(weight_scale) != len(weight):
            raise ValueError("`weight_scale` must be positive, one for each output channel")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        self.register_buffer("weight_scale", weight_scale.detach().float())
        self.register_buffer("weight_zero", torch.zeros(len(weight), dtype=torch.int64))
        self.dequantize = DequantizeWeight()
        self.input, self.output, self.scheme = input, output or nn.Identity(), scheme

    def dequantized_weight(self) -> Tensor:
        """The weights as numbers, float32."""
        return self.dequantize(self.weight, self.weight_scale, self.weight_zero)

    def condition(self) -> float:
        """Largest change of an output by one step of one input."""
        return float(self.dequantized_weight().abs().max()) * self.input.scale


class QuantizedConv2d(_QuantizedLayer):
    """A convolution of integers: y = conv(Q(x), weight * weight_scale) + bias.

    Args:
        weight: int8, (C_out, C_in / groups, K, K).
        weight_scale: (C_out,), positive.
        bias: (C_out,), float32; see `round_bias`.
        input: Rounds the input.
        output: Rounds the output, before the activation; needed where what follows is neither a
            quantized layer nor a ReLU in front of one: else the kernel returns float numbers.
        scheme: Of the weights: "int4" has -8..7, "palette4" at most 16 different values.
        stride, padding, dilation, groups: As of `nn.Conv2d`.

    Raises:
        ValueError: The weights are not integers of the scheme, or a scale is not positive.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor,
        input: QuantizeDequantize,
        output: nn.Module | None = None,
        scheme: Scheme = "int8",
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(weight, weight_scale, bias, input, output, scheme)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        y = F.conv2d(
            self.input(x),
            self.dequantized_weight(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return self.output(y)


class QuantizedLinear(_QuantizedLayer):
    """A linear layer of integers: y = Q(x) (weight * weight_scale)ᵀ + bias.

    Args and errors: as of `QuantizedConv2d`, without those of a convolution; `weight` is
    (C_out, C_in).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out)."""
        return self.output(F.linear(self.input(x), self.dequantized_weight(), self.bias))


def round_bias(bias: Tensor, input_scale: float | Tensor, weight_scale: Tensor) -> Tensor:
    """The nearest bias that integer kernels can hold: int32 steps of input times weight scale.

    Args:
        bias: (C_out,).
        input_scale: Of the layer's input.
        weight_scale: (C_out,).
    """
    step = input_scale * weight_scale.double()
    return ((bias.double() / step).round().clamp(-_LIMIT, _LIMIT) * step).to(bias.dtype)
