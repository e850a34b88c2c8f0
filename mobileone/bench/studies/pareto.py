"""Accuracy against latency: the paper's Figure 1, own measurements on top."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mobileone.bench.paper import UNVERIFIED, paper_row, paper_table
from mobileone.bench.results import Result, compare_machines
from mobileone.bench.show.charts import COLORS, plain_ticks, save_figure

__all__ = ["draw_pareto"]

_OURS, _OTHERS, _PAPER = COLORS[4], COLORS[0], "#777777"

# right below, above, level; left above, below, level; then farther away; in points
_PLACES = (
    *((4, -9), (4, 4), (6, -2), (-4, 4), (-4, -9), (-6, -2)),
    *((12, -17), (12, 12), (-12, 12), (-12, -17), (22, -2), (-22, -2)),
)
# where it is farther away, a line shows whose it is
_LINE = {"arrowstyle": "-", "linewidth": 0.4, "color": "#555555", "shrinkA": 0, "shrinkB": 2}


@dataclass(frozen=True)
class Point:
    """A network in the chart.

    Attributes:
        label: What it is called there.
        latency: In milliseconds.
        top1: In percent.
        family: Whether it is a MobileOne.
        verified: Whether the accuracy was read where it was published.
    """

    label: str
    latency: float
    top1: float
    family: bool
    verified: bool = True


def draw_pareto(
    results: Sequence[str] = (), runtime: str | None = None, output: str | Path = "."
) -> tuple[Path, Path]:
    """Draw accuracy against latency, with the Pareto fronts.

    Args:
        results: Latency results of one machine; none: the paper's data alone.
        runtime: Which of their runtimes; None: onnxruntime, or the first where that is missing.
        output: Folder for `pareto.png` and `pareto.svg`.

    Returns:
        The two files.

    Raises:
        ValueError: The results are of different machines, threads or sizes, or hold nothing of
            that runtime whose accuracy is known.
        FileNotFoundError: There is no such result.
    """
    loaded = [Result.load(path) for path in results]
    runtime = runtime or _usual_runtime(loaded)
    measured = measured_points(loaded, runtime) if loaded else []
    canvas = Figure(figsize=(8, 5.5), layout="constrained")
    axes = canvas.subplots()
    paper = paper_points()
    _draw_set(axes, paper, f"paper: {paper_table(9).columns['mobile_ms']}", own=False)
    if loaded:
        _draw_set(axes, measured, _legend(loaded[0], runtime), own=True)
    latencies = _latencies(loaded, runtime)
    unknown = {name: time for name, time in latencies.items() if _point(name, time) is None}
    _draw_unknown(axes, unknown)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    times = [*(point.latency for point in paper), *latencies.values()]
    axes.set_xlim(0.85 * min(times), 1.3 * max(times))
    axes.set_xlabel("latency (ms, logarithmic)")
    axes.set_ylabel("ImageNet top-1 (%)")
    axes.grid(alpha=0.3, linewidth=0.5)
    note = f"* accuracy as quoted elsewhere{UNVERIFIED}"
    canvas.legend(
        loc="outside lower center", ncols=2 if loaded else 1, fontsize=7.5, frameon=False,
        title=None if all(point.verified for point in measured) else note, title_fontsize=7,
    )  # fmt: skip
    named = _labels(measured, own=True) + _labels(paper, own=False, all_of_them=not loaded)
    _place_labels(axes, named, [*paper, *measured])
    return save_figure(canvas, Path(output) / "pareto")


def paper_points() -> list[Point]:
    """Table 9, with its latency on the phone, as in Figure 1."""
    return [
        Point(row["model"], row["mobile_ms"], row["top1"], row["model"].startswith("MobileOne"))
        for row in paper_table(9).rows
    ]


def measured_points(results: Sequence[Result], runtime: str) -> list[Point]:
    """Networks that were measured and whose accuracy is recorded; a later result wins.

    Raises:
        ValueError: See `draw_pareto`.
    """
    compare_machines(results)
    for key in ("statistic", "threads", "batch_size", "device"):
        values = {str(result.protocol.get(key)) for result in results}
        if len(values) > 1:
            raise ValueError(f"the results differ in `{key}`: {', '.join(sorted(values))}")
    found = (_point(name, time) for name, time in _latencies(results, runtime).items())
    points = [point for point in found if point is not None]
    if not points:
        there = sorted({row["runtime"] for result in results for row in result.rows})
        raise ValueError(
            f"`runtime` (={runtime!r}): no network of known accuracy was measured in it; "
            f"the results are of {', '.join(there)}"
        )
    return points


def _latencies(results: Sequence[Result], runtime: str) -> dict[str, float]:
    """The number to quote of every network that was measured in a runtime, by name."""
    return {
        row["model"]: row[result.statistic]
        for result in results
        for row in result.rows
        if row["runtime"] == runtime and row.get(result.statistic) is not None
    }


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both latency and accuracy, by latency."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.latency, -p.top1)):
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def _usual_runtime(results: Sequence[Result]) -> str:
    there = {row["runtime"]: None for r in results for row in r.rows if row["failure"] is None}
    return "onnxruntime" if "onnxruntime" in there else next(iter(there), "")


def _point(model: str, latency: float) -> Point | None:
    paper = paper_row(model)
    if paper is not None:
        name = paper["model"]
        return Point(name, latency, paper["top1"], name.startswith("MobileOne"))
    text = files("mobileone.bench").joinpath("peers.json").read_text(encoding="utf-8")
    peers = json.loads(text)
    for row in peers["rows"]:
        if row["build"] == model.partition(".")[0]:
            mark = "" if peers["verified"] else "*"
            return Point(row["label"] + mark, latency, row["top1"], False, peers["verified"])
    return None


def _draw_set(axes: Axes, points: Sequence[Point], name: str, own: bool) -> None:
    front = pareto_front(points)
    line = ("-", 1.4) if own else ("--", 1.0)
    color = "black" if own else _PAPER
    axes.plot(
        [p.latency for p in front], [p.top1 for p in front], line[0], linewidth=line[1],
        color=color, drawstyle="steps-post", zorder=1, label=f"Pareto front, {name}",
    )  # fmt: skip
    for family, marker in ((True, "s"), (False, "o")):
        chosen = [p for p in points if p.family == family]
        if not chosen:  # or the legend would name what is not there
            continue
        edge = (_OURS if family else _OTHERS) if own else _PAPER
        axes.scatter(
            [p.latency for p in chosen], [p.top1 for p in chosen], s=34 if own else 22,
            marker=marker, facecolors=edge if own else "white", edgecolors=edge, zorder=3,
            label=f"{'MobileOne' if family else 'others'}, {name}",
        )  # fmt: skip


def _draw_unknown(axes: Axes, latencies: Mapping[str, float]) -> None:
    """Mark networks without a known accuracy on the axis of latency."""
    if not latencies:
        return
    on_axis = axes.get_xaxis_transform()  # x in ms, y from 0 to 1
    axes.scatter(
        list(latencies.values()), [0.01] * len(latencies), marker="^", s=30, color="black",
        transform=on_axis, clip_on=False, label="here, accuracy not recorded",
    )  # fmt: skip
    for name, latency in latencies.items():
        axes.annotate(
            name, (latency, 0.01), xycoords=on_axis, xytext=(0, 6), textcoords="offset points",
            rotation=90, fontsize=6.5, ha="center", va="bottom",
        )  # fmt: skip


def _labels(
    points: Sequence[Point], own: bool, all_of_them: bool = True
) -> list[tuple[Point, dict[str, Any]]]:
    """The labels of MobileOnes first; without `all_of_them`, of these and of the front alone."""
    front = pareto_front(points)
    style = {"fontsize": 6.5, "color": "black" if own else "#555555"}
    return [
        (point, style | {"fontweight": "bold" if point.family else "normal"})
        for point in sorted(points, key=lambda p: not p.family)
        if all_of_them or point.family or point in front
    ]


def _legend(result: Result, runtime: str) -> str:
    protocol = result.protocol
    word = protocol["statistic"].removesuffix("_ms")
    return (
        f"here: {result.machine['device_name']}, {runtime}, {protocol['threads']} thread"
        f"{'s' if protocol['threads'] > 1 else ''}, {word} of {protocol['runs']}"
    )


def _place_labels(
    axes: Axes, labels: Sequence[tuple[Point, dict[str, Any]]], points: Sequence[Point]
) -> None:
    """Write each label at the first place around its point that is free.

    A label for which none is free stays at the place that it covers least at; call it when the
    chart is otherwise complete.

    Args:
        axes: Where.
        labels: The points to name, each with the style, the most important ones first.
        points: All points that are drawn.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where points are
    marks = axes.transData.transform([(point.latency, point.top1) for point in points])
    reach = 3 * figure.dpi / 72
    taken = [Bbox([(x - reach, y - reach), (x + reach, y + reach)]) for x, y in marks]
    for point, style in labels:
        text, at = point.label.replace("MobileOne-", ""), (point.latency, point.top1)
        label = axes.annotate(text, at, xytext=_PLACES[0], textcoords="offset points", **style)
        tried = []
        for place in _PLACES:
            label.set_position(place)
            label.set_horizontalalignment("left" if place[0] > 0 else "right")
            box = label.get_window_extent()
            tried.append((_covered(box, taken, axes.bbox), place, box))
            if tried[-1][0] == 0:
                break
        _, place, box = min(tried, key=lambda trial: trial[0])
        label.set_position(place)
        label.set_horizontalalignment("left" if place[0] > 0 else "right")
        taken.append(box)
        if abs(place[0]) > 6:
            axes.annotate("", at, place, textcoords="offset points", arrowprops=_LINE)


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Area of what the box covers, and of what of it is outside the frame."""
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0)
    overlaps = (Bbox.intersection(box, other) for other in taken)
    return outside + sum(o.width * o.height for o in overlaps if o is not None)
