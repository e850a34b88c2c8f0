"""The chart of accuracy against latency."""

import dataclasses

import pytest

from mobileone.bench.results import Result
from mobileone.bench.studies import pareto
from mobileone.bench.studies.pareto import (
    Point,
    draw_pareto,
    measured_points,
    paper_points,
    pareto_front,
)


@pytest.fixture
def result():
    row = {"runtime": "eager", "failure": None}
    rows = [
        row | {"model": "mobileone_s0", "min_ms": 20.0},
        row | {"model": "mobileone_s4", "min_ms": 90.0},
        row | {"model": "starnet_s1", "min_ms": 30.0},
        row | {"model": "resnet18", "min_ms": 50.0},  # whose accuracy nobody recorded
        row | {"model": "mobileone_s1", "failure": "broken"},
        row | {"model": "mobileone_s2", "runtime": "other", "min_ms": 1.0},
    ]
    protocol = {"statistic": "min_ms", "runs": 5, "threads": 1, "batch_size": 1, "device": "cpu"}
    return Result.new("latency", protocol, rows)


def test_the_front_of_the_paper_is_mobileone_but_for_the_fastest():
    names = [point.label for point in pareto_front(paper_points())]
    assert names == ["ShuffleNetV2-1.0", *(f"MobileOne-S{i}" for i in range(5))]
    assert len(paper_points()) == 30


def test_a_point_as_fast_but_worse_is_not_on_the_front():
    points = [Point("a", 1, 70, False), Point("b", 1, 71, False), Point("c", 2, 71, False)]
    assert [p.label for p in pareto_front(points)] == ["b"]


def test_measured_points_have_the_accuracy_that_is_recorded(result):
    points = {p.label: p for p in measured_points([result], "eager")}
    assert set(points) == {"MobileOne-S0", "MobileOne-S4", "StarNet-S1*"}
    assert points["MobileOne-S4"] == Point("MobileOne-S4", 90.0, 79.4, True)
    assert not points["StarNet-S1*"].verified  # marked wherever it is shown


def test_both_files_are_written(result, tmp_path):
    saved = result.save(tmp_path / "latency.json")
    png, svg = draw_pareto([str(saved)], "eager", output=tmp_path / "figures")
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()[:1000]
    assert sorted(p.name for p in png.parent.iterdir()) == ["pareto.png", "pareto.svg"]


def test_what_cannot_be_compared_is_refused(result):
    other = dataclasses.replace(result, machine=result.machine | {"machine_id": "x"})
    with pytest.raises(ValueError, match="different machines"):
        measured_points([result, other], "eager")
    threads = dataclasses.replace(result, protocol=result.protocol | {"threads": 2})
    with pytest.raises(ValueError, match="differ in `threads`"):
        measured_points([result, threads], "eager")
    with pytest.raises(ValueError, match=r"`runtime` \(='openvino'\).*eager, other"):
        measured_points([result], "openvino")


def test_every_measured_network_is_drawn_and_the_legend_names_no_other(
    result, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(pareto, "save_figure", lambda figure, stem: drawn.append(figure))
    statistic = result.protocol["statistic"]
    mine = {"model": "my_network", "runtime": "eager", statistic: 300.0}
    family = [row for row in result.rows if "mobileone" in row["model"]]
    for rows in ([*result.rows, mine], family):
        saved = dataclasses.replace(result, rows=rows).save(tmp_path / "latency.json")
        draw_pareto([str(saved)], "eager")
    first, second = (figure.axes[0] for figure in drawn)
    assert "my_network" in [text.get_text() for text in first.texts]
    assert first.get_xlim()[1] > 300
    legend = [str(name) for name in second.get_legend_handles_labels()[1]]
    assert any(name.startswith("MobileOne, here") for name in legend)
    assert not any(name.startswith("others, here") or "not recorded" in name for name in legend)
