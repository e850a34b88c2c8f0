"""Rounding that gradients pass through, and the quantizers of inputs and weights.

Gradients are straight-through: 1 where a value was not clipped, 0 where it was. Steps may be
learned (LSQ, Esser et al., ICLR 2020).
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "FEW_BITS",
    "SCHEMES",
    "ActivationQuantizer",
    "Scales",
    "Scheme",
    "WeightQuantizer",
    "straight_through",
]

Scheme = Literal["int8", "int4", "palette4"]
"""How weights are stored; inputs of layers always have 256 steps."""

Scales = Literal["learned", "running"]
"""Steps by gradient, or from the extremes of what is seen (weights: of the weights)."""

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
FEW_BITS: tuple[Scheme, ...] = ("int4", "palette4")  # a weight, or its place in a table, has four

_LEVELS = 255
_MOMENTUM = 0.01  # of running extremes
_STEPS = (2.0**-100, 2.0**60)  # whose reciprocals and squares float32 holds
_BIAS_STEPS = 2.0**30  # half of what an int32 holds: the rest is for the sum that is added to it
_FAINTEST = 2.0**-16  # step of a channel's weights, in parts of the layer's largest: see `steps`
_TABLE = 16  # entries of a palette
_CLIPS = torch.linspace(0.5, 1.0, 26)


class _StraightThrough(torch.autograd.Function):
    """The rounded value, with the gradient of the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, of which the gradient goes to `value`."""
    rounded = rounded.to(value.dtype)
    if not value.requires_grad:
        return rounded
    result: Tensor = _StraightThrough.apply(value, rounded)
    return result


class _RoundToGrid(torch.autograd.Function):
    """x to the nearest of scale · (low … high), which are codes less their zero point.

    ∂/∂scale is Σ g (x̂ − x 1[not clipped]) / scale times LSQ's factor 1 / sqrt(number · steps). It
    goes to the step, also where that is out of bounds: so it comes back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        inverse, wide = _inverse(scale, x.dtype), scale.to(x.dtype)
        low, high = _bounds(zero_point)
        rounded = (x * inverse).round_()
        rounded = rounded.clamp_(low, high).mul_(wide)
        ctx.save_for_backward(x, rounded if step.requires_grad else None, scale, zero_point)
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, rounded, scale, zero_point = ctx.saved_tensors
        low, high = _bounds(zero_point)
        dx = _where_inside(g, x, (low - 0.5) * _host(scale), (high + 0.5) * _host(scale))
        if rounded is None:
            return dx, None, None, None
        # (x̂ − x) would be a pass of its own
        dstep = (_dot(g, rounded) - _dot(dx, x)) / scale.to(x.dtype)
        factor = (x.numel() * _LEVELS) ** -0.5
        return dx, (dstep * factor).to(scale.dtype).view_as(scale), None, None


def _bounds(zero_point: Tensor) -> tuple[Any, Any]:
    low = -_host(zero_point)
    return low, low + _LEVELS


def _host(scalar: Tensor) -> Any:
    """A number on a CPU, where passes with numbers are faster; a GPU is not waited for."""
    return scalar.item() if scalar.device.type == "cpu" else scalar


def _inverse(step: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / step as the deployed layers compute it: in float64, then rounded."""
    return step.double().reciprocal().to(dtype)


def _where_inside(g: Tensor, x: Tensor, low: Any, high: Any) -> Tensor:
    if isinstance(low, Tensor):
        return torch.where((x > low) & (x < high), g, 0)
    return torch.ops.aten.hardtanh_backward(g, x, low, high)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to 256 steps: ((clamp(round(x / s) + z, 0, 255) − z) s.

    A fresh quantizer has no step, NaN: its outputs are not numbers, until `observe` or a state
    dict gives it one. What is used is `scale`.

    Args:
        scales: How the step moves in training.
        fixed: It does not move: the input is made of 8-bit images, whose extremes are known. One
            grid for all channels, with a code for zero, has the images' own values where they are
            multiples of one step: all channels of one `std`, and every `mean` a multiple of 1/255,
            as 0. Else values move by up to about half a step, and some of the 256 become one:
            255 stay for mean and std of 0.5, 234 to 240 in ImageNet's channels.
    """

    step: Tensor
    zero_point: Tensor

    def __init__(self, scales: Scales = "learned", fixed: bool = False) -> None:
        super().__init__()
        self.running = scales == "running" and not fixed
        step = torch.tensor(torch.nan)
        if scales == "learned" and not fixed:
            self.step = nn.Parameter(step)
        else:
            self.register_buffer("step", step)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if self.training and self.running and torch._C._current_graph_task_id() == -1:
            self._follow(x.detach())  # not where checkpointing runs a layer again
        rounded: Tensor = _RoundToGrid.apply(x, self.step, self.scale, self.zero_point)
        return rounded

    @property
    def calibrated(self) -> bool:
        """Whether there is a step."""
        return not self.step.isnan()

    @property
    def scale(self) -> Tensor:
        """The step, positive and finite wherever training has brought it; NaN if there is none."""
        return self.step.detach().clamp(*_STEPS)

    def variance(self) -> Tensor:
        """Of what rounding adds to an input, s² / 12; a constant for gradients."""
        return self.scale.square() / 12

    @torch.no_grad()
    def observe(self, low: Tensor, high: Tensor) -> None:
        """Take a grid that holds 0 and all from `low` to `high`, scalars."""
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        step = (high - low).clamp(min=torch.finfo(torch.float32).tiny * 2**16) / _LEVELS
        zero = (-low / step).round()
        above, below = high / (_LEVELS - zero).clamp(min=1), -low / zero.clamp(min=1)
        self.step.copy_(torch.maximum(torch.maximum(above, below), step * 2**-8))
        self.zero_point.copy_(zero)

    @torch.no_grad()
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The least and the largest number of the grid."""
        low = -self.zero_point * self.scale
        return low, low + _LEVELS * self.scale

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        low, high = self.extremes()
        new_low, new_high = torch.aminmax(x)
        self.observe(low.lerp(new_low.to(low), _MOMENTUM), high.lerp(new_high.to(low), _MOMENTUM))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        _keep_own(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class WeightQuantizer(nn.Module):
    """Rounds kernels (C_out, …) to integers times one step an output channel.

    `int8` and `int4` have the integers −127 … 127 and −7 … 7; `palette4` has 16 of the former, in
    a table for all channels.

    Args:
        channels: C_out.
        scheme: One of `SCHEMES`.
        scales: `learned` learns how much of each channel's largest weight is kept.
    """

    clip: Tensor
    table: Tensor

    def __init__(self, channels: int, scheme: Scheme = "int8", scales: Scales = "learned") -> None:
        super().__init__()
        self.scheme, self.largest = scheme, 7 if scheme == "int4" else 127
        clip = torch.ones(channels)
        if scales == "learned" and scheme == "int4":
            self.clip = nn.Parameter(clip)
        else:
            self.register_buffer("clip", clip)
        if scheme == "palette4":
            self.table = nn.Parameter(torch.linspace(-127, 127, _TABLE))

    def steps(self, weight: Tensor, bias: Tensor, input_step: Tensor) -> Tensor:
        """Step of each channel's weights, (C_out,), positive.

        It is at least what lets a bias be counted in int32 at `input_step` times it, and no
        channel's is so far below the others that a runtime's multiplier could not hold it.
        """
        largest = weight.detach().flatten(1).abs().amax(1) / self.largest
        least = bias.detach().abs() / (input_step.detach() * _BIAS_STEPS)
        floor = largest.max() * _FAINTEST
        steps = torch.maximum(torch.maximum(largest * self.clip, least), floor)
        return torch.where(steps > 0, steps, 1.0)

    def codes(self, weight: Tensor, steps: Tensor) -> Tensor:
        """The integers, as floating-point numbers, (C_out, …)."""
        scaled = weight.detach() / _per_channel(steps.detach(), weight)
        if self.scheme == "palette4":
            table = self._entries()
            return table[_nearest(scaled, table)]
        return scaled.round_().clamp_(-self.largest, self.largest)

    def _entries(self) -> Tensor:
        """The table's integers, within those of 8 bits."""
        return self.table.detach().round().clamp(-self.largest, self.largest)

    def forward(self, weight: Tensor, bias: Tensor, input_step: Tensor) -> Tensor:
        """The rounded kernel; gradients go to the kernel, and to clips or the table."""
        steps = self.steps(weight, bias, input_step)
        codes = self.codes(weight, steps)
        wide = _per_channel(steps, weight)
        if self.scheme == "palette4":
            return self._from_table(weight, codes, wide)
        if not steps.requires_grad:
            return straight_through(weight, codes * wide)
        # LSQ: within the range round(v) − v, outside the clipped code
        inside = codes.abs() < self.largest
        inside |= weight.detach().abs() <= (self.largest + 0.5) * wide.detach()
        rest = codes - torch.where(inside, weight.detach() / wide.detach(), 0)
        factor = (weight[0].numel() * self.largest) ** -0.5
        moved = wide * factor + (wide * (1 - factor)).detach()
        value = torch.where(inside, weight, weight.detach()) + rest * moved
        return straight_through(value, codes * wide.detach())

    def _from_table(self, weight: Tensor, codes: Tensor, wide: Tensor) -> Tensor:
        """Each entry of the table gets the mean gradient of the weights that it stands for."""
        entry = _nearest(codes, self._entries())
        used = torch.bincount(entry.flatten(), minlength=_TABLE).clamp(min=1)
        chosen = (self.table / used)[entry] * wide.detach()
        value = weight + chosen - chosen.detach()
        return straight_through(value, codes * wide.detach())

    @torch.no_grad()
    def fit(self, weight: Tensor, bias: Tensor, input_step: Tensor) -> None:
        """Choose clips, or the table, of least squared error for a kernel (C_out, …)."""
        if self.scheme == "int4":
            self._fit_clips(weight)
        elif self.scheme == "palette4":
            scaled = weight / _per_channel(self.steps(weight, bias, input_step), weight)
            self.table.copy_(_k_means(scaled.flatten(), self.table))

    def _fit_clips(self, weight: Tensor) -> None:
        rows = weight.flatten(1)
        full = rows.abs().amax(1, keepdim=True) / self.largest
        clips = _CLIPS.to(rows)
        errors = []
        for clip in clips:
            step = torch.where(full > 0, full * clip, 1.0)
            rounded = (rows / step).round().clamp(-self.largest, self.largest) * step
            errors.append((rounded - rows).square().sum(1))
        self.clip.copy_(clips[torch.stack(errors).argmin(0)])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        _keep_own(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _keep_own(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let weights without any state of a quantizer, a float network's, load."""
    own = {prefix + name: value for name, value in module.state_dict().items()}
    if not any(name in state_dict for name in own):
        state_dict.update(own)


def _per_channel(steps: Tensor, weight: Tensor) -> Tensor:
    return steps.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of a table, in the shape of the values."""
    order = table.argsort()
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[torch.bucketize(values, middles.to(values.dtype))]


def _k_means(values: Tensor, table: Tensor) -> Tensor:
    """A table of least squared error for values, from their quantiles (Lloyd's algorithm)."""
    share = torch.linspace(0, 1, _TABLE, device=values.device, dtype=values.dtype)
    ordered = values.sort().values
    table = ordered[(share * (len(ordered) - 1)).long()]
    for _ in range(50):
        entry = _nearest(values, table)
        count = torch.bincount(entry, minlength=_TABLE)
        total = torch.bincount(entry, weights=values, minlength=_TABLE)
        table = torch.where(count > 0, total / count.clamp(min=1), table).to(values.dtype)
    return table
