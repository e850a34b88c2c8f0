"""What activations and architectural blocks cost in latency: the paper's Tables 2 and 3."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from mobileone.bench.inference.latency import measure_latency
from mobileone.bench.paper import paper_table
from mobileone.bench.results import Result, Row

__all__ = ["study_bottlenecks"]


def _hyper_function(channels: int, coefficients: int, reduction: int) -> nn.Sequential:
    """Coefficients in (0, 1) from the complete image: (N, C, H, W) -> (N, coefficients, 1, 1)."""
    hidden = max(1, channels // reduction)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, coefficients, 1),
    )


class DynamicReLU(nn.Module):
    r"""Dynamic ReLU (Chen et al., ECCV 2020, arXiv 2003.10027), of two linear pieces.

    y_c = max_k (a_c^k(x) x_c + b_c^k(x)), k = 1, 2, where the coefficients are residuals from
    those of ReLU: a^k = α^k + λ_a (2 σ(θ) − 1), b^k = β^k + λ_b (2 σ(θ) − 1), with α¹ = 1, all
    other α and β 0, λ_a = 1, λ_b = 0.5; θ comes from the pooled input by two layers.

    Args:
        channels: C.
        kind: "A" shares the coefficients among all channels, "B" has them for each channel.
        reduction: Of the hidden layer, 8 in the paper.

    Shape:
        (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int, kind: Literal["A", "B"], reduction: int = 8) -> None:
        super().__init__()
        self.width = 1 if kind == "A" else channels
        self.theta = _hyper_function(channels, 4 * self.width, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        residual = 2 * torch.sigmoid(self.theta(x)) - 1  # (N, 4 · width, 1, 1)
        a1, a2, b1, b2 = residual.split(self.width, dim=1)
        return torch.maximum(x * (1 + a1) + 0.5 * b1, x * a2 + 0.5 * b2)


class DynamicShiftMax(nn.Module):
    r"""Dynamic Shift-Max of MicroNet (Li et al., ICCV 2021, arXiv 2108.05894), J = K = 2.

    y_i = max_k Σ_j a_{i,j}^k(x) x_{(i + j C/G) mod C}, j = 0, 1, k = 1, 2: the larger of two
    combinations of a channel and of the one C/G further on, in a circle. The coefficients are
    residuals from those of ReLU, a_{i,0}^1 = 1 and all others 0, of a hard sigmoid of two layers
    on the pooled input, scaled to (−1, 1).

    Args:
        channels: C, a multiple of G.
        groups: G.
        reduction: Of the hidden layer.

    Shape:
        (N, C, H, W) -> (N, C, H, W).

    Raises:
        ValueError: `groups` does not divide `channels`.
    """

    def __init__(self, channels: int, groups: int = 4, reduction: int = 8) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"`groups` (={groups}) must divide `channels` (={channels})")
        self.shift = channels // groups
        self.channels = channels
        self.theta = _hyper_function(channels, 4 * channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        residual = 2 * nn.functional.hardsigmoid(self.theta(x)) - 1  # (N, 4 C, 1, 1)
        own1, own2, other1, other2 = residual.split(self.channels, dim=1)
        # channel i becomes channel i + C/G of the input, in a circle
        shifted = torch.cat((x[:, self.shift :], x[:, : self.shift]), dim=1)
        return torch.maximum(x * (1 + own1) + shifted * other1, x * own2 + shifted * other2)


WIDTHS = (16, 32, 64, 128, 256)
"""Channels of the five stages. Each has six layers, so thirty in all."""

_DEPTH = 6

LAYOUT = (
    "Ours, as the paper does not publish its own: thirty 3×3 convolutions with BatchNorm (folded "
    "before timing), in five stages of six; the first of each stage has stride 2; "
    f"{', '.join(map(str, WIDTHS))} channels, so that all layers but the first of each stage have "
    "the same number of multiply-adds; then average pooling and 1000 classes. Squeeze-and-excite "
    "(ratio 1/16) is before the activation of every layer, a skip connection around each of "
    "the 25 layers that keep their shape, before the activation."
)

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "ReLU": lambda channels: nn.ReLU(),
    "GELU": lambda channels: nn.GELU(),
    "SE-ReLU": lambda channels: nn.Sequential(_squeeze_excite(channels), nn.ReLU()),
    "SiLU": lambda channels: nn.SiLU(),
    "Dynamic Shift-Max": DynamicShiftMax,
    "DynamicReLU-A": partial(DynamicReLU, kind="A"),
    "DynamicReLU-B": partial(DynamicReLU, kind="B"),
}
"""The rows of Table 2, by the names there: what builds each from its number of channels."""

BLOCKS = {
    "baseline": "ReLU",
    "squeeze-and-excite": "SE-ReLU",
    "skip connections": "skip connections",
}
"""The rows of Table 3, each with the network that it is; the first two are in Table 2 as well."""

_STEADY = 1.3  # median over minimum, of the middle one of the rows
_BASELINE = "ReLU"
_TIMES = ("runtime", "min_ms", "median_ms", "p90_ms", "mean_ms", "max_ms", "timed", "failure")


class ThirtyLayers(nn.Module):
    """A plain network of thirty 3×3 convolutions; see `LAYOUT`.

    Args:
        activation: Builds the activation from its number of channels.
        skip: Add a layer's input to its output where shapes agree.
        num_classes: Width of the output.

    Shape:
        (N, 3, H, W) -> (N, num_classes).
    """

    def __init__(
        self, activation: Callable[[int], nn.Module], skip: bool = False, num_classes: int = 1000
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            for index in range(_DEPTH):
                stride = 2 if index == 0 else 1
                layers.append(_Layer(channels, width, stride, activation(width), skip))
                channels = width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, num_classes)."""
        logits: Tensor = self.fc(self.pool(self.layers(x)).flatten(1))
        return logits


class _Layer(nn.Module):
    def __init__(
        self, in_chs: int, out_chs: int, stride: int, activation: nn.Module, skip: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chs)
        self.act = activation
        self.skip = skip and stride == 1 and in_chs == out_chs
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        if self.skip:
            y = y + x
        out: Tensor = self.act(y)
        return out


def study_bottlenecks(
    runtimes: Sequence[str] | None = None,
    protocol: str = "paper",
    runs: int | None = None,
    threads: int = 1,
    input_size: int = 224,
) -> Result:
    """Time a 30-layer network with different activations, with skips, and with SE.

    Args:
        runtimes: Names in `mobileone.bench.runtimes.RUNTIMES`; None: all that are present.
        protocol: As `mobileone.bench.inference.latency.measure_latency` has them.
        runs: Timed inferences of each network; None: the protocol's.
        threads: CPU threads.
        input_size: Height and width in pixels.

    Returns:
        A row for each runtime and each line of the paper's Tables 2 and 3: `paper_table`, `name`,
        `runtime`, the times of a latency result, `ratio` to the plain network with ReLU by the
        protocol's statistic, `ratio_median` by the median, and `paper_ms`, `paper_ratio`,
        `paper_verified`.

    Raises:
        ValueError: An argument is out of its range.
        ImportError: A runtime was named that is not installed.
    """
    modules: dict[str, Callable[[], nn.Module]] = {
        name: partial(ThirtyLayers, activation) for name, activation in ACTIVATIONS.items()
    }
    modules["skip connections"] = partial(ThirtyLayers, ACTIVATIONS[_BASELINE], skip=True)
    latency = measure_latency(modules, runtimes, protocol, runs, threads, 1, input_size)
    rows = _rows(latency)
    how = latency.protocol | {"note": "\n".join(filter(None, [LAYOUT, _busy(rows)]))}
    return replace(latency, kind="bottlenecks", protocol=how, rows=rows)


def _squeeze_excite(channels: int) -> nn.Module:
    return SqueezeExcite(channels, rd_ratio=1 / 16, rd_divisor=1)


def _rows(latency: Result) -> list[Row]:
    statistic = latency.protocol["statistic"]
    measured = {(row["model"], row["runtime"]): row for row in latency.rows}
    runtimes = dict.fromkeys(row["runtime"] for row in latency.rows)
    rows: list[Row] = []
    for table_number, names in ((2, {name: name for name in ACTIVATIONS}), (3, BLOCKS)):
        table = paper_table(table_number)
        paper = {row.get("activation", row.get("block")): row["mobile_ms"] for row in table.rows}
        first = next(iter(paper))  # the plain network
        for name, network in names.items():
            for runtime in runtimes:
                row, base = measured[network, runtime], measured[_BASELINE, runtime]
                rows.append(
                    {"paper_table": table_number, "name": name}
                    | {key: row.get(key) for key in _TIMES}
                    | {"ratio": _ratio(row, base, statistic)}
                    | {"ratio_median": _ratio(row, base, "median_ms")}
                    | {"paper_ms": paper[name], "paper_ratio": paper[name] / paper[first]}
                    | {"paper_verified": table.verified}
                )
    return rows


def _busy(rows: Sequence[Row]) -> str:
    """A warning where times vary so much that their minima are a matter of luck."""
    spread = [row["median_ms"] / row["min_ms"] for row in rows if row["failure"] is None]
    middle = statistics.median(spread or [1.0])
    busy = f"The machine was busy: medians are {middle:.1f} times the minima."
    return "" if middle < _STEADY else f"{busy} Measure again when it is idle."


def _ratio(row: Row, base: Row, statistic: str) -> float | None:
    own, other = row.get(statistic), base.get(statistic)
    return own / other if own and other else None
