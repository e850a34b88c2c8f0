"""The 30-layer network, its activations by their formulas, and the study of Tables 2 and 3."""

import math

import pytest
import torch
from rich.console import Console
from torch import nn

from mobileone.bench.paper import paper_table
from mobileone.bench.results import Result
from mobileone.bench.show.charts import bar_figure
from mobileone.bench.show.tables import result_table
from mobileone.bench.studies import bottlenecks
from mobileone.bench.studies.bottlenecks import (
    ACTIVATIONS,
    BLOCKS,
    DynamicReLU,
    DynamicShiftMax,
    ThirtyLayers,
    study_bottlenecks,
)


def test_thirty_layers_of_equal_cost():
    model = ThirtyLayers(ACTIVATIONS["ReLU"])
    costs = []

    def count(conv, _, output):
        costs.append(conv.weight.numel() * output.shape[-1] * output.shape[-2])

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert len(costs) == 30
    same = [cost for i, cost in enumerate(costs) if i % 6]
    assert len(same) == 25
    assert set(same) == {9 * 16 * 16 * 112 * 112}


def test_skips_stand_where_shapes_agree():
    torch.manual_seed(1)
    plain = ThirtyLayers(ACTIVATIONS["ReLU"]).eval()
    skips = ThirtyLayers(ACTIVATIONS["ReLU"], skip=True).eval()
    skips.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    for index, (one, other) in enumerate(zip(plain.layers, skips.layers, strict=True)):
        if index % 6:
            assert torch.equal(other(x), (one.bn(one.conv(x)) + x).relu())
        else:
            assert torch.equal(other(x), one(x))
        x = one(x)


def test_every_line_of_the_papers_tables_is_measured():
    lines = {row["activation"] for row in paper_table(2).rows}
    assert set(ACTIVATIONS) == lines
    assert set(BLOCKS) == {row["block"] for row in paper_table(3).rows}


@pytest.fixture(scope="module")
def result():
    return study_bottlenecks(["eager"], runs=2, input_size=32)


def test_the_study(result):
    assert len(result.rows) == 10
    assert "thirty 3×3 convolutions" in result.protocol["note"]
    rows = {(row["paper_table"], row["name"]): row for row in result.rows}
    base = rows[2, "ReLU"]["min_ms"]
    for row in result.rows:
        assert row["failure"] is None
        assert row["ratio"] == pytest.approx(row["min_ms"] / base)
        assert row["paper_ratio"] == pytest.approx(row["paper_ms"] / 1.53)
        assert row["paper_verified"] == (row["paper_table"] == 2)
    # the same networks stand in both tables, measured once
    assert rows[3, "squeeze-and-excite"]["min_ms"] == rows[2, "SE-ReLU"]["min_ms"]


def test_unverified_numbers_are_marked(result, capsys):
    Console(width=200).print(result_table(result))
    lines = capsys.readouterr().out.splitlines()
    assert "unverified" in next(line for line in lines if "skip connections" in line)
    assert "unverified" not in next(line for line in lines if "GELU" in line)
    labels = [axes.get_xlabel() for axes in bar_figure(result).axes]
    assert labels == ["× ReLU", "paper: ratio", "× ReLU", "paper: ratio (unverified)"]


@pytest.mark.parametrize(("median", "said"), [(1.1, False), (1.6, True)])
def test_a_busy_machine_is_said(result, median, said):
    rows = [row | {"median_ms": median * row["min_ms"]} for row in result.rows]
    assert ("The machine was busy" in bottlenecks._busy(rows)) == said


def test_a_runtime_that_fails_is_said(result):
    times = ("min_ms", "median_ms", "ratio", "ratio_median")
    rows = [
        row | dict.fromkeys(times) | {"failure": "no such operator"}
        if row["name"] == "DynamicReLU-A"
        else row
        for row in result.rows
    ]
    failed = Result(**{**vars(result), "rows": rows})
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as output:
        console.print(result_table(failed))
    assert "no such operator" in output.get()
    assert "failed" in [t.get_text() for a in bar_figure(failed).axes for t in a.texts]


def coefficients(layer: nn.Sequential, image: torch.Tensor) -> list[float]:
    """θ of one image (C, H, W), by two matrix products on the means."""
    _, first, _, second = layer
    hidden = first.weight[:, :, 0, 0] @ image.mean(dim=(1, 2)) + first.bias
    return (second.weight[:, :, 0, 0] @ hidden.clamp(min=0) + second.bias).tolist()


@pytest.mark.parametrize("kind", ["A", "B"])
@torch.no_grad()
def test_dynamic_relu_is_its_formula(kind):
    layer = DynamicReLU(8, kind).double()
    nn.init.normal_(layer.theta[3].weight)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    y = layer(x)
    width = 1 if kind == "A" else 8
    for image, out in zip(x, y, strict=True):
        residual = [2 / (1 + math.exp(-t)) - 1 for t in coefficients(layer.theta, image)]
        assert len(residual) == 4 * width
        for c in range(8):
            a1, a2, b1, b2 = (residual[k * width + c % width] for k in range(4))
            for value, result in zip(image[c].flatten(), out[c].flatten(), strict=True):
                pieces = ((1 + a1) * value + 0.5 * b1, a2 * value + 0.5 * b2)
                assert float(result) == pytest.approx(float(max(pieces)), rel=1e-12)


@torch.no_grad()
def test_shift_max_is_its_formula():
    layer = DynamicShiftMax(8, groups=4).double()
    nn.init.normal_(layer.theta[3].weight, std=3)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    y = layer(x)
    for image, out in zip(x, y, strict=True):
        hard = [min(max(t / 6 + 0.5, 0), 1) for t in coefficients(layer.theta, image)]
        own1, own2, other1, other2 = ([2 * h - 1 for h in hard[k : k + 8]] for k in (0, 8, 16, 24))
        for i in range(8):
            other = image[(i + 8 // 4) % 8]
            first = (1 + own1[i]) * image[i] + other1[i] * other
            second = own2[i] * image[i] + other2[i] * other
            assert torch.allclose(out[i], torch.maximum(first, second), rtol=1e-12)


@pytest.mark.parametrize(
    "layer", [DynamicReLU(8, "A"), DynamicReLU(8, "B"), DynamicShiftMax(8)], ids=["A", "B", "max"]
)
@torch.no_grad()
def test_without_residuals_they_are_relu(layer):
    nn.init.zeros_(layer.theta[3].weight)
    nn.init.zeros_(layer.theta[3].bias)
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), x.relu())


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"`groups` \(=4\) must divide `channels` \(=6\)"):
        DynamicShiftMax(6, groups=4)
