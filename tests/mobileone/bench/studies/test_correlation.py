"""Rank correlations against the formula, and the study of Table 1."""

import random

import pytest

from lightning_modules.cli.main import main
from mobileone.bench.results import Result
from mobileone.bench.show.tables import result_table
from mobileone.bench.studies.correlation import rank_correlation, study_correlation


def ranks(values: list[float]) -> list[float]:
    """Average ranks, by counting."""
    return [sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2 for x in values]


def pearson(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return products / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


def test_rank_correlation_is_pearsons_of_the_ranks():
    draw = random.Random(0)
    x = [draw.random() for _ in range(20)]
    y = [round(v + draw.random(), 1) for v in x]  # with ties
    rho, p = rank_correlation(x, y)
    assert rho == pytest.approx(pearson(ranks(x), ranks(y)))
    assert 0 < p < 1
    assert rank_correlation(x, [v**3 for v in x])[0] == pytest.approx(1)


def test_p_of_few_points_is_counted():
    """Of the 24 orders of four, the given one and its reverse are as extreme."""
    rho, p = rank_correlation([1, 2, 3, 4], [1, 2, 3, 4])
    assert (rho, p) == pytest.approx((1, 2 / 24))


def test_what_has_no_correlation_has_none():
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 3, 4], [5, 5, 5, 5]) is None


MODELS = ("mobileone_mu0", "mobilenetv3_small_050", "mnasnet_small", "lcnet_050")


@pytest.mark.slow
def test_the_study(tmp_path):
    names = ["study", "correlation", *MODELS, "--runtimes", "[eager]", "--runs", "1"]
    main([*names, "--output", str(tmp_path)])
    result = Result.load(tmp_path / "correlation.json", "correlation")
    points = [row for row in result.rows if row.get("level") == "point"]
    assert [row["model"] for row in points] == list(MODELS)
    here = {row["quantity"]: row for row in result.rows if row.get("source") == "here"}
    for quantity, row in here.items():
        x = [point[quantity] for point in points]
        y = [point["min_ms"] for point in points]
        assert row["rho"] == pytest.approx(pearson(ranks(x), ranks(y)))
        assert row["n"] == 4
    printed = [row for row in result.rows if row.get("source") == "paper, Table 1"]
    assert [row["rho"] for row in printed] == [0.47, 0.30, 0.06, 0.07]
    assert (tmp_path / "correlation.png").stat().st_size > 5_000
    assert (tmp_path / "correlation.svg").read_text().startswith("<?xml")
    assert result_table(result).row_count == 2 + 4


def test_three_networks_are_too_few():
    with pytest.raises(ValueError, match="at least 4"):
        study_correlation(models=MODELS[:3])
