"""The 30-layer network and the study of Tables 2 and 3."""

import pytest
import torch
from rich.console import Console
from torch import nn

from mobileone.bench.paper import paper_table
from mobileone.bench.results import Result
from mobileone.bench.studies.bottlenecks import (
    ACTIVATIONS,
    BLOCKS,
    ThirtyLayers,
    bottlenecks_figure,
    bottlenecks_table,
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
def study():
    return study_bottlenecks(["eager"], runs=2, image_size=32)


def test_the_study(study):
    result = study
    assert len(result.rows) == 10
    assert "thirty 3×3 convolutions" in result.protocol["layout"]
    rows = {(row["paper_table"], row["name"]): row for row in result.rows}
    base = rows[2, "ReLU"]["min_ms"]
    for row in result.rows:
        assert row["failure"] is None
        assert row["ratio"] == pytest.approx(row["min_ms"] / base)
        assert row["paper_ratio"] == pytest.approx(row["paper_ms"] / 1.53)
        assert row["paper_verified"] == (row["paper_table"] == 2)
    # the same networks stand in both tables, measured once
    assert rows[3, "squeeze-and-excite"]["min_ms"] == rows[2, "SE-ReLU"]["min_ms"]


def test_unverified_numbers_are_marked(study, capsys):
    result = study
    Console(width=200).print(bottlenecks_table(result))
    lines = capsys.readouterr().out.splitlines()
    assert "unverified" in next(line for line in lines if "skip connections" in line)
    assert "unverified" not in next(line for line in lines if "GELU" in line)
    texts = [t.get_text() for a in bottlenecks_figure(result).axes for t in a.get_legend().texts]
    assert texts.count("paper, iPhone 12") == texts.count("paper, iPhone 12 (unverified)") == 1


@pytest.mark.parametrize(("median", "said"), [(1.1, False), (1.6, True)])
def test_a_busy_machine_is_said(study, median, said):
    result = study
    rows = [row | {"median_ms": median * row["min_ms"]} for row in result.rows]
    other = Result(**{**vars(result), "rows": rows})
    assert ("The machine was busy" in bottlenecks_table(other).caption) == said
    assert ("The machine was busy" in bottlenecks_figure(other).get_suptitle()) == said


def test_a_runtime_that_fails_is_said(study):
    result = study
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
        console.print(bottlenecks_table(failed))
    assert "no such operator" in output.get()
    assert "failed" in [t.get_text() for a in bottlenecks_figure(failed).axes for t in a.texts]
