"""The training form of a quantized block: its branches, folded and rounded in one convolution."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="arg-type,union-attr,assignment,call-overload"

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileone.block import FusedMobileOneBlock
from mobileone.collapsed.branches import update_running_statistics
from mobileone.quantization.batch_statistics import fold_on_batch
from mobileone.quantization.deployed import (
    QuantizedConv2d,
    QuantizeDequantize,
    QuantizedLinear,
    round_bias,
)
from mobileone.quantization.foldable import BLOCKS, PLAIN, Branch, Row, fold_branches
from mobileone.quantization.rounding import (
    ActivationQuantizer,
    Scales,
    Scheme,
    WeightQuantizer,
    straight_through,
)

__all__ = ["QuantizedLayer", "Statistics"]

Statistics = Literal["frozen", "exact", "diagonal"]
"""Of BatchNorm in training: running ones; a batch's, from the exact second moments of the rounded
input; or from their diagonal alone (RepQ-BNEst)."""


class QuantizedLayer(nn.Module):
    """y = after(Q(Ŵ) ∗ Q(x) + b̂), Ŵ and b̂ folded from the branches at each step.

    It has the children, parameters and buffers of the block that it is made from, under their
    names, and those of its two quantizers besides.

    Args:
        block: One of `BLOCKS` or `PLAIN`, whose parts it takes over.
        scheme: How weights are rounded.
        statistics: Of BatchNorm in training; eval mode always has the running ones.
        kappa: Part κ of the variance of rounding that is added to the running variances.
        scales: How steps are found.
        image: Whether the input is made of 8-bit images; see `ActivationQuantizer`.
    """

    def __init__(
        self,
        block: nn.Module,
        scheme: Scheme,
        statistics: Statistics,
        kappa: float,
        scales: Scales,
        image: bool,
    ) -> None:
        super().__init__()
        self.kind, self.training = type(block), block.training
        self.scheme, self.statistics, self.kappa, self.scales = scheme, statistics, kappa, scales
        self._modules.update(block._modules)
        self._parameters.update(block._parameters)
        self._buffers.update(block._buffers)
        conv = self.row.conv(self)
        self.geometry: tuple[Any, ...] | None = None
        if self.kind is not nn.Linear:
            like = block if self.kind is nn.Conv2d else conv
            self.geometry = (like.stride, like.padding, like.dilation, like.groups)
        self.input_quantizer = ActivationQuantizer(scales, fixed=image)
        self.weight_quantizer = WeightQuantizer(len(conv.weight), scheme, scales)
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            quantizer.to(conv.weight.device, wide).train(block.training)
        self.output_quantizer: ActivationQuantizer | None = None
        self.calibrating = False

    def round_output(self) -> None:
        """Round the sum as well: what follows is not a layer, behind a ReLU at most."""
        self.output_quantizer = ActivationQuantizer(self.scales)
        self.output_quantizer.to(self.input_quantizer.step).train(self.training)

    def followers(self) -> list[nn.Module]:
        """What follows the sum inside of the block and does something."""
        after = map(self.get_submodule, self.row.after)
        return [module for module in after if type(module) is not nn.Identity]

    @property
    def row(self) -> Row:
        """How the block is read."""
        return (BLOCKS if self.kind in BLOCKS else PLAIN)[self.kind]

    def branches(self) -> list[Branch]:
        """The block's branches, of its present weights."""
        return self.row.branches(self)

    def noise(self) -> Tensor:
        """Variance that folding adds to each input: κ s² / 12, a scalar."""
        return self.kappa * self.input_quantizer.variance()

    def fold(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias on running statistics, not rounded; differentiable in the branches."""
        return fold_branches(self.branches(), self.noise())

    def round(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel and bias as integers hold them; gradients go straight through."""
        step = self.input_quantizer.scale
        steps = self.weight_quantizer.steps(weight, bias, step).detach()
        rounded = self.weight_quantizer(weight, bias, step)
        return rounded, straight_through(bias, round_bias(bias.detach(), step, steps))

    def forward(self, x: Tensor) -> Tensor:
        """Map what the block maps; in float32 under autocast, as 8 bits are not exact below."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.input_quantizer.step.dtype)
            if self.calibrating:
                self._calibrate(x)
            y = self._product(self.input_quantizer(x))
            if self.output_quantizer is not None:
                if self.calibrating:
                    rectified = [type(module) for module in self.followers()] == [nn.ReLU]
                    _widen(self.output_quantizer, y.relu() if rectified else y)
                # a copy: a ReLU that follows writes into it, and the step's gradient needs it
                y = self.output_quantizer(y).clone()
        for name in self.row.after:
            y = self.get_submodule(name)(y)
        return y

    def _product(self, x: Tensor) -> Tensor:
        weight, bias = self.round(*self._fold_on(x))
        if self.geometry is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, *self.geometry)

    def _fold_on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fold on running statistics, or, where they are asked for, on those of x."""
        branches, conv = self.branches(), self.row.conv(self)
        trained = self.training and all(branch.norm is not None for branch in branches)
        if self.statistics == "frozen" or not trained or not all(n.training for n in self.norms()):
            return self.fold()
        if any(isinstance(norm, nn.SyncBatchNorm) for norm in self.norms()):
            raise ValueError(
                f"`statistics` (={self.statistics!r}) are those of one process, and SyncBatchNorm "
                "takes those of all: leave it out, or choose 'frozen'"
            )
        diagonal = self.statistics == "diagonal"
        weight, bias, *found = fold_on_batch(x, branches, conv, self.noise(), diagonal)
        if torch._C._current_graph_task_id() == -1:  # checkpointing does not run it again
            with torch.no_grad():
                update_running_statistics(self, *found)
        return weight, bias

    def norms(self) -> list[nn.Module]:
        """The BatchNorms of the branches, the skip's last."""
        return [branch.norm for branch in self.branches() if branch.norm is not None]

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        first = not self.input_quantizer.calibrated
        _widen(self.input_quantizer, x)
        if first:  # later batches hardly change the folded kernel
            self.fit_weights()

    @torch.no_grad()
    def fit_weights(self) -> None:
        """Fit clips, or the table, to the kernel that the input's step gives."""
        self.weight_quantizer.fit(*self.fold(), self.input_quantizer.scale)

    def quantizers(self) -> list[ActivationQuantizer]:
        """Of the input, and of the output where it has one."""
        found = (self.input_quantizer, self.output_quantizer)
        return [quantizer for quantizer in found if quantizer is not None]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The deployed form, with integer weights; shares what follows the sum.

        Raises:
            ValueError: There is no input step yet.
        """
        if not self.input_quantizer.calibrated:
            raise ValueError(
                "a quantized layer has no input step: call calibrate_quantization(model, batches) "
                "or load the weights of a quantized network before folding it"
            )
        product = self._deployed()
        if not self.row.after:
            return product
        after = [self.get_submodule(name) for name in self.row.after]
        fused = FusedMobileOneBlock(product, *after)
        fused.training = self.training
        return fused

    def _deployed(self) -> nn.Module:
        weight, bias = self.fold()
        step = self.input_quantizer.scale
        steps = self.weight_quantizer.steps(weight, bias, step)
        codes = self.weight_quantizer.codes(weight, steps).to(torch.int8)
        grid = _grid(self.input_quantizer)
        output = None if self.output_quantizer is None else _grid(self.output_quantizer)
        bias = round_bias(bias, float(step), steps)
        if self.geometry is None:
            layer: nn.Module = QuantizedLinear(codes, steps, bias, grid, output, self.scheme)
        else:
            stride, padding, dilation, groups = self.geometry
            layer = QuantizedConv2d(
                codes,
                steps,
                bias,
                grid,
                output,
                self.scheme,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
            )
        return layer.train(self.training)

    @torch.no_grad()
    def condition(self) -> float:
        """Largest change of an output by one step of one input."""
        return float(self.fold()[0].abs().max() * self.input_quantizer.scale)

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        return (
            f"{self.kind.__name__}, scheme={self.scheme}, statistics={self.statistics}, "
            f"kappa={self.kappa:g}, scales={self.scales}"
        )


@torch.no_grad()
def _widen(quantizer: ActivationQuantizer, x: Tensor) -> None:
    """Let a grid hold all of x, and what it holds already, if it has a step."""
    low, high = torch.aminmax(x.detach())
    if quantizer.calibrated:
        least, largest = quantizer.extremes()
        low, high = torch.minimum(low, least), torch.maximum(high, largest)
    quantizer.observe(low, high)


def _grid(quantizer: ActivationQuantizer) -> QuantizeDequantize:
    return QuantizeDequantize(float(quantizer.scale), int(quantizer.zero_point))
