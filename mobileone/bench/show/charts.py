"""How charts of results look, and how they are written: PNG and SVG, atomically."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mobileone.io.atomic import atomic_write

__all__ = ["COLORS", "HATCHES", "MARKERS", "draw_bars", "plain_ticks", "save_figure"]

# Okabe and Ito, 2008: distinct for the color-blind; the order alternates dark and light, so
# that neighbors differ in a gray print as well. Markers and hatches repeat the distinction.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def plain_ticks(axis: Axis) -> None:
    """1, 2, 3, 5, 10 … on a logarithmic axis, as they are read, instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float | None, str]]],
    start: float = 0.0,
) -> None:
    """Horizontal bars: a group for each name, from top to bottom, and in it a bar a series.

    Args:
        axes: Where.
        names: What the groups are called.
        series: Label -> length and text of each group's bar; a length of None has the text alone.
        start: Where the bars begin.
    """
    thickness = 0.84 / len(series)
    for i, (label, bars) in enumerate(series.items()):
        places = [group + (i - (len(series) - 1) / 2) * thickness for group in range(len(names))]
        drawn = [(y, value) for y, (value, _) in zip(places, bars, strict=True) if value]
        axes.barh(
            [y for y, _ in drawn],
            [value - start for _, value in drawn],
            thickness,
            left=start,
            color=COLORS[i % len(COLORS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
            label=label,
        )
        for y, (value, text) in zip(places, bars, strict=True):
            axes.annotate(
                text, (max(value or start, start), y), (4, 0), textcoords="offset points",
                va="center", fontsize=8, annotation_clip=False,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.spines[["top", "right"]].set_visible(False)


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
            warnings.catch_warnings(),
            matplotlib.rc_context({"svg.hashsalt": stem.name}),
        ):
            warnings.filterwarnings("ignore", message=r"Glyph \d+")  # names in any script
            figure.savefig(partial, format=kind, dpi=160, metadata=metadata)
        files.append(final)
    return files[0], files[1]
