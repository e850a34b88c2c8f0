"""How charts of results look, and how they are written: PNG and SVG, atomically."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mobileone.bench.paper import UNVERIFIED
from mobileone.bench.results import KINDS, Result, Row
from mobileone.bench.show.tables import cell, heading, title
from mobileone.io.atomic import atomic_write

__all__ = ["COLORS", "MARKERS", "bar_figure", "plain_ticks", "save_figure", "write_figure"]

# Okabe and Ito, 2008: distinct for the color-blind; the order alternates dark and light, so
# that neighbors differ in a gray print as well. Markers and hatches repeat the distinction.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDE = 30  # times the shortest bar: then the axis is logarithmic
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def plain_ticks(axis: Axis) -> None:
    """1, 2, 3, 5, 10 … on a logarithmic axis, as they are read, instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def bar_figure(result: Result) -> Figure:
    """Bars of the columns that `Kind.bars` names, side by side; a panel a value of the first key.

    Means have their deviations. Accuracies do not begin at 0, or differences could not be seen.
    What no runtime here can run, and interpreters, whose times mean nothing, are left out.
    """
    panel, name, *more = result.keys
    color = more[0] if more else panel
    meant = [row for row in result.rows if row.get("speed", True) and row.get("runtime", True)]
    shown = meant or result.rows
    panels, colors = _grouped(shown, panel), list(_grouped(shown, color))
    columns = [column or result.statistic for column in KINDS[result.kind].bars]
    heights = [0.5 + 0.25 * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(5 + 3 * len(columns), 1 + sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(panels), len(columns), squeeze=False, sharey="row", height_ratios=heights
    )
    for line, (value, rows) in zip(grid, panels.items(), strict=True):
        names = list(_grouped(rows, name))
        series = {label: _grouped(own, name) for label, own in _grouped(rows, color).items()}
        for axes, column in zip(line, columns, strict=True):
            start = _start(column, rows)
            beside = {key: list(_grouped(own, color)) for key, own in _grouped(rows, name).items()}
            for label, own in series.items():
                shares = [1 / len(beside[key]) for key in own]
                ranks = [beside[key].index(label) for key in own]
                places = [
                    names.index(key) + 0.84 * (share * (rank + 0.5) - 0.5)
                    for key, share, rank in zip(own, shares, ranks, strict=True)
                ]
                bars = [found[-1] for found in own.values()]
                style = colors.index(label) % len(COLORS)
                _draw_bars(axes, bars, column, places, [0.84 * s for s in shares], start, style)
            lengths = [row[column] for row in rows if row.get(column)]
            if lengths and max(lengths) > _WIDE * min(lengths):
                axes.set_xscale("log")
                plain_ticks(axes.xaxis)
            doubtful = column.startswith("paper_") and not all(r["paper_verified"] for r in rows)
            axes.set_xlabel(heading(column) + UNVERIFIED * doubtful, fontsize=9)
            axes.set_yticks(range(len(names)), [Path(str(key)).name for key in names])
            axes.set_ylim(len(names) - 0.45, -0.55)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.2)
        line[0].set_title(f"{heading(panel)} {value}", fontsize=9, loc="left")
    if more:
        patches = {
            key: Patch(facecolor=COLORS[i % 7], hatch=HATCHES[i % 7])
            for i, key in enumerate(colors)
            if key
        }
        figure.legend(
            patches.values(), patches.keys(), loc="outside lower center", ncols=4, fontsize=8
        )
    figure.suptitle("\n".join(wrap(title(result), 100)), fontsize=8)
    return figure


def _grouped(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    """The rows by their value of a column, in the order of the first of each."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _start(column: str, rows: Sequence[Row]) -> float:
    """Where bars begin: at 0, and those of accuracies a little below the least."""
    known = [row[column] for row in rows if row.get(column) is not None]
    if not known or column not in ("acc1_mean", "paper_top1"):
        return 0.0
    return float(min(known) - (0.25 * (max(known) - min(known)) or 1.0))


def _draw_bars(
    axes: Axes,
    rows: Sequence[Row],
    column: str,
    places: Sequence[float],
    thickness: Sequence[float],
    start: float,
    style: int,
) -> None:
    """The bars of one color, each with its value; of what failed the word alone."""
    values = [row.get(column) for row in rows]
    has_spread = column.endswith("_mean")
    spread = [row.get(column.replace("mean", "std")) or 0.0 if has_spread else 0.0 for row in rows]
    axes.barh(
        places,
        [(value or start) - start for value in values],
        thickness,
        left=start,
        xerr=spread if any(spread) else None,
        color=COLORS[style],
        hatch=HATCHES[style],
        edgecolor="white",
    )
    for y, value, wide, row in zip(places, values, spread, rows, strict=True):
        text = "failed" if row.get("failure") else cell(value)
        axes.annotate(
            text, ((value or start) + wide, y), (4, 0), textcoords="offset points",
            va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write `<stem>.png` and `<stem>.svg`; the folder is made if it is missing.

    Args:
        figure: The chart.
        stem: Path without an ending.

    Returns:
        The two files.
    """
    stem = Path(stem)
    files = []
    for kind in ("png", "svg"):
        final = stem.with_name(f"{stem.name}.{kind}")
        # a date inside would make equal charts differ
        metadata = {"Date": None} if kind == "svg" else None
        with (
            atomic_write(final) as partial,
            matplotlib.rc_context({"svg.hashsalt": stem.name}),
        ):
            write_figure(figure, partial, kind, metadata=metadata)
        files.append(final)
    return files[0], files[1]


def write_figure(figure: Figure, file: Path | IO[bytes], kind: str = "png", **options: Any) -> None:
    """Write a chart; of names in a script that the font lacks, boxes.

    Args:
        figure: The chart.
        file: Path or stream.
        kind: `png` or `svg`.
        options: Of matplotlib's `savefig`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure.savefig(file, format=kind, dpi=160, **options)
