"""How well multiply-adds and parameters predict latency: the paper's Table 1."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from mobileone.bench.inference.latency import measure_latency
from mobileone.bench.inference.profile import profile_models
from mobileone.bench.paper import paper_table
from mobileone.bench.results import Result, Row
from mobileone.bench.show.charts import COLORS, MARKERS, plain_ticks
from mobileone.bench.suites import choose_models

__all__ = ["correlation_figure", "study_correlation"]

QUANTITIES = {"mmacs": "multiply-adds (M)", "params_m": "parameters (M)"}

_FEW = 7  # of them all 5040 permutations are tried
_LEAST = 4  # points; of three, every order has a |ρ| of at least 0.5


def study_correlation(
    models: Sequence[str] = (),
    suite: str | None = None,
    runtimes: Sequence[str] | None = None,
    protocol: str = "paper",
    runs: int | None = None,
    threads: int = 1,
) -> Result:
    """Time networks and correlate their latency with their multiply-adds and parameters.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        suite: A group of models, in addition: `paper` (Table 9, the default where no model is
            named) or `2026`.
        runtimes: Names in `mobileone.bench.runtimes.RUNTIMES`; None: all that are present.
        protocol: As `mobileone.bench.inference.latency.measure_latency` has them.
        runs: Timed inferences of each; None: the protocol's.
        threads: CPU threads.

    Returns:
        A row for each runtime and quantity: `source` ("here"), `device` (the runtime),
        `quantity`, Spearman's `rho`, its two-sided `p`, `n`; then the paper's rows as printed in
        Table 1 ("paper, Table 1", no `n`). Last the points, with `level` "point": rows of a latency
        result, `mmacs`, `params_m`.

    Raises:
        ValueError: An argument is out of its range, or there are fewer than four models.
        ImportError: A runtime was named that is not installed.
    """
    names, choice = choose_models(models, suite or (None if models else "paper"))
    if len(names) < _LEAST:
        raise ValueError(f"`models` (={list(names)}): a rank correlation needs at least {_LEAST}")
    latency = measure_latency(names, runtimes, protocol, runs, threads)
    counted = {r["model"]: r for r in profile_models(names).rows if r["level"] == "model"}
    points = [row | _counts(counted[row["model"]]) for row in latency.rows]
    rows = [*_measured(points, latency.statistic), *_printed(), *points]
    how = latency.protocol | choice
    return replace(latency, kind="correlation", protocol=how, rows=rows)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Spearman's rank correlation and its two-sided p, over all permutations where they are few.

    Args:
        x: Values.
        y: As many values.

    Returns:
        ρ and p; None for fewer than four points, or where one of the two is constant.
    """
    from scipy.stats import permutation_test, spearmanr  # half a second to import

    if len(x) < _LEAST or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found: Any = spearmanr(x, y)
    rho, p = float(found.statistic), float(found.pvalue)
    if len(x) <= _FEW:  # Student's t, which that p is of, is far off: 0 where ρ is 1
        p = permutation_test(
            (x,), lambda x: spearmanr(x, y).statistic, permutation_type="pairings"
        ).pvalue
    return rho, float(p)


def correlation_figure(result: Result) -> Figure:
    """Latency over multiply-adds and over parameters, a marker for each runtime."""
    correlations, points = _split(result)
    statistic = str(result.protocol["statistic"])
    here = {(r["device"], r["quantity"]): r for r in correlations if r["source"] == "here"}
    runtimes = list(dict.fromkeys(row["runtime"] for row in points))
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (quantity, label) in zip(panels, QUANTITIES.items(), strict=True):
        for i, runtime in enumerate(runtimes):
            rows = [r for r in points if r["runtime"] == runtime and r["failure"] is None]
            own = [r["model"].startswith("mobileone_") for r in rows]
            found, color = here[runtime, quantity], COLORS[i % len(COLORS)]
            rho = "ρ –" if found["rho"] is None else f"ρ {found['rho']:.2f}, p {found['p']:.2g}"
            axis.scatter(
                [r[quantity] for r in rows],
                [r[statistic] for r in rows],
                s=34,
                marker=MARKERS[i % len(MARKERS)],
                facecolor=[color if filled else "none" for filled in own],
                edgecolor=color,
                linewidth=1.4,
                label=f"{runtime}: {rho}",
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        plain_ticks(axis.xaxis)
        plain_ticks(axis.yaxis)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        paper = [r for r in _printed() if r["quantity"] == quantity]
        printed = "; ".join(f"{r['device']} ρ {r['rho']:.2f}, p {r['p']:.2f}" for r in paper)
        axis.set_title(f"paper: {printed}", fontsize=9)
    figure.axes[0].set_ylabel(f"latency, {statistic.removesuffix('_ms')} (ms)")
    figure.suptitle(
        f"{len({r['model'] for r in points})} networks (filled: MobileOne), "
        f"{result.machine['cpu']}, {result.protocol['threads']} thread(s)",
        fontsize=10,
    )
    return figure


def _split(result: Result) -> tuple[list[Row], list[Row]]:
    """The correlations, and the points that they are of."""
    points = [row for row in result.rows if row.get("level") == "point"]
    return [row for row in result.rows if row.get("level") != "point"], points


def _counts(row: Row) -> Row:
    return {"level": "point", "mmacs": row["macs"] / 1e6, "params_m": row["parameters"] / 1e6}


def _measured(points: Sequence[Row], statistic: str) -> list[Row]:
    rows: list[Row] = []
    for runtime in dict.fromkeys(row["runtime"] for row in points):
        timed = [r for r in points if r["runtime"] == runtime and r["failure"] is None]
        latencies = [row[statistic] for row in timed]
        for quantity in QUANTITIES:
            found = rank_correlation([row[quantity] for row in timed], latencies)
            rho, p = found or (None, None)
            row = {"source": "here", "device": runtime, "quantity": quantity}
            rows.append(row | {"rho": rho, "p": p, "n": len(timed)})
    return rows


def _printed() -> list[Row]:
    table = paper_table(1)
    source = table.mark("paper, Table 1")
    return [{"source": source, "n": None} | dict(row) for row in table.rows]
