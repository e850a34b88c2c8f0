"""The ablation study as a table and as a chart, with the paper's lines beside."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from mobileone.bench.paper import UNVERIFIED
from mobileone.bench.results import Result, Row
from mobileone.bench.show.charts import COLORS

__all__ = ["ablation_figure", "ablation_table"]

_TITLES = {
    "k": "over-parameterization factor k (paper's Table 6)",
    "branches": "branches in training (paper's Table 5)",
    "recipe": "recipe, one part added after the other (paper's Table 8)",
}


def ablation_table(result: Result) -> Table:
    """The rows for a terminal."""
    how = result.protocol
    table = Table(
        title=f"{how['model']} on {how['config']}, {how['image_size']} px, {how['epochs']} epochs: "
        "accuracy on the validation images after the last epoch, mean ± deviation over seeds",
        caption="The paper's numbers are of ImageNet and 300 epochs: compare differences at most.",
    )
    for heading in ("part", "setting"):
        table.add_column(heading)
    for heading in ("seeds", "top-1 (%)", "loss", "training loss", "s", "paper, top-1 (%)"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row["part"],
            row["setting"],
            str(row["n"]),
            _accuracy(row),
            f"{row['loss_mean']:.4f}",
            f"{row['train_loss_mean']:.4f}",
            f"{row['seconds_mean']:.0f}",
            _paper(row),
        )
    return table


def ablation_figure(result: Result) -> Figure:
    """Mean accuracy of each setting with its deviation, and the paper's on an axis of its own."""
    parts = list(dict.fromkeys(row["part"] for row in result.rows))
    groups = [[row for row in result.rows if row["part"] == part] for part in parts]
    height = 1.1 + sum(0.75 + 0.34 * len(rows) for rows in groups)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False, height_ratios=[len(g) for g in groups])
    for (here, there), part, rows in zip(axes, parts, groups, strict=True):
        names = [row["setting"] for row in rows]
        spread = [row["acc1_std"] or 0.0 for row in rows]
        _points(here, names, [row["acc1_mean"] for row in rows], spread, COLORS[0], "o")
        here.set_title(_TITLES[part], fontsize=9, loc="left")
        known = [row for row in rows if row["paper_top1"] is not None]
        places = [names.index(row["setting"]) for row in known]
        _points(there, names, [row["paper_top1"] for row in known], [], COLORS[4], "s", places)
        mark = "" if all(row["paper_verified"] for row in rows) else UNVERIFIED
        there.set_title(f"paper, {rows[0]['paper_model']}{mark}", fontsize=9, loc="right")
        there.set_yticklabels([])
    axes[-1][0].set_xlabel("top-1 here (%)", fontsize=9)
    axes[-1][1].set_xlabel("top-1 on ImageNet (%)", fontsize=9)
    how = result.protocol
    seeds = f"{how['seeds']} seed" + ("s, bars: deviation" if how["seeds"] > 1 else "")
    figure.suptitle(
        f"{how['model']}, {how['config']}, {how['image_size']} px, {how['epochs']} epochs, {seeds}",
        fontsize=10,
    )
    return figure


def _points(
    axis: Axes,
    names: Sequence[str],
    values: Sequence[float],
    spread: Sequence[float],
    color: str,
    marker: str,
    places: Sequence[int] | None = None,
) -> None:
    y = list(range(len(names))) if places is None else list(places)
    error = list(spread) if any(spread) else None
    axis.errorbar(values, y, xerr=error, fmt=marker, color=color, capsize=3)
    for place, value in zip(y, values, strict=True):
        axis.annotate(
            f"{value:.1f}", (value, place), (0, 5), textcoords="offset points", fontsize=8,
            ha="center",
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.7)
    axis.margins(x=0.15)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _accuracy(row: Row) -> str:
    spread = "" if row["acc1_std"] is None else f" ± {row['acc1_std']:.2f}"
    return f"{row['acc1_mean']:.2f}{spread}"


def _paper(row: Row) -> str:
    if row["paper_top1"] is None:
        return "–"
    mark = "" if row["paper_verified"] else UNVERIFIED
    return f"{row['paper_top1']:.1f} {row['paper_model']}{mark}"
