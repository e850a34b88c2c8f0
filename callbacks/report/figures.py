"""Figures for people who would rather look than read: sample predictions, confusion matrix."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mobileone.bench.show.charts import COLORS

__all__ = ["confusion_figure", "curve_figures", "curves_figure", "read_curves", "samples_figure"]

Curves = Mapping[str, Sequence[tuple[int, float]]]

_RIGHT, _WRONG, _SHADE = COLORS[0], COLORS[4], "#999999"
_STYLES: dict[str, dict[str, Any]] = {
    "train/loss": {"color": _SHADE},
    "train/loss_epoch": {"color": _RIGHT, "marker": "o"},
    "val/loss": {"color": _WRONG, "marker": "x"},
    "val/acc1": {"color": _RIGHT, "marker": "o"},
    "val/acc5": {"color": _WRONG, "marker": "x"},
}
_PANELS = {
    "loss": ("train/loss", "train/loss_epoch", "val/loss"),
    "accuracy": ("val/acc1", "val/acc5"),
    "learning rate": ("lr",),
    "weight decay": ("weight_decay",),
}


def samples_figure(
    images: Tensor, targets: Tensor, probabilities: Tensor, class_names: Sequence[str]
) -> Figure:
    """Images with the predicted class and its probability; mistakes also show the true class.

    Args:
        images: (N, C, H, W), values in 0..1, with 1, 3 or 4 channels; others show the first.
        targets: (N,), class indices.
        probabilities: (N, number of classes).
        class_names: Names of the classes.

    Returns:
        A grid of at most eight images a row.
    """
    count = len(images)
    columns = min(count, 8)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    confidence, predicted = probabilities.max(dim=1)
    for axis, image, target, guess, p in zip(
        axes, images, targets.tolist(), predicted.tolist(), confidence.tolist(), strict=False
    ):
        pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)
        shown = pixels if pixels.shape[-1] in (3, 4) else pixels[..., 0]
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
        right = guess == target
        title = f"{_short(class_names[guess])} {p:.0%}"
        if not right:
            title = f"✗ {title}\ntrue: {_short(class_names[target])}"
        axis.set_title(title, fontsize=8, color=_RIGHT if right else _WRONG)
    return figure


def confusion_figure(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Confusion matrix, each row scaled to the share of its true class.

    Args:
        confusion: Counts (number of classes)²; row = true class, column = predicted class.
        class_names: Names of the classes.

    Returns:
        The matrix, with counts written in where there are at most 20 classes.
    """
    counts = confusion.to(torch.float64)
    share = (counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).numpy()
    number = len(class_names)
    side = min(max(4.0, 0.45 * number), 20.0)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(share, cmap=matplotlib.colormaps["cividis"], vmin=0, vmax=1)
    figure.colorbar(drawn, label="share of the true class")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if number <= 60:
        names = [_short(name) for name in class_names]
        axis.set_xticks(range(number), names, rotation=90, fontsize=8)
        axis.set_yticks(range(number), names, fontsize=8)
    if number <= 20:
        for row, column in np.argwhere(counts.numpy() > 0):
            axis.text(
                column,
                row,
                f"{int(counts[row, column])}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if share[row, column] > 0.5 else "white",
            )
    return figure


def curves_figure(curves: Curves) -> Figure:
    """Loss, accuracy, learning rate, weight decay and further metrics over the optimizer steps.

    Args:
        curves: Points (step, value) of each metric, by its logged name.

    Returns:
        Four panels, and one for each further metric of validation; a panel without any of its
        metrics says so.
    """
    panels = _panels(curves)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2).ravel()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        _draw_curves(axis, title, names, curves)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    return figure


def curve_figures(curves: Curves) -> dict[str, Figure]:
    """The panels of `curves_figure` one by one, for narrow screens.

    Args:
        curves: Points (step, value) of each metric, by its logged name.

    Returns:
        A chart for each panel that has points, by its title.
    """
    figures = {}
    for title, names in _panels(curves).items():
        if any(curves.get(name) for name in names):
            figures[title] = Figure(figsize=(5, 3.2), layout="constrained")
            _draw_curves(figures[title].subplots(), title, names, curves)
    return figures


def _panels(curves: Curves) -> dict[str, tuple[str, ...]]:
    """Titles and metrics; the user's own metrics differ in scale, so each has a panel."""
    usual = {name for names in _PANELS.values() for name in names}
    further = [name for name in curves if name.startswith("val/") and name not in usual]
    return {**_PANELS, **{name.removeprefix("val/"): (name,) for name in further}}


def _draw_curves(axis: Axes, title: str, names: Sequence[str], curves: Curves) -> None:
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    shown = [name for name in names if curves.get(name)]
    for name in shown:
        steps, values = zip(*curves[name], strict=True)
        axis.plot(steps, values, label=name, **_STYLES.get(name, {"color": _RIGHT}))
    if title == "loss" and shown:
        _keep_outliers_out(axis, [v for name in shown for _, v in curves[name]])
    if len(shown) > 1:
        axis.legend(fontsize=8)
    if not shown:
        axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes)
    axis.set_xlabel("step", fontsize=8)


def _keep_outliers_out(axis: Axes, values: Sequence[float]) -> None:
    """The loss of a first, barely averaged model can be thousands: it would flatten the rest."""
    finite = np.asarray([v for v in values if np.isfinite(v)])
    if len(finite):
        axis.set_ylim(0, 1.1 * min(finite.max(), 4 * np.median(finite)))


def _short(name: str, length: int = 18) -> str:
    plain = name.replace("$", r"\$")  # matplotlib reads a pair of dollars as a formula
    return plain if len(plain) <= length else plain[: length - 1] + "…"


_EVALUATED = ("val/", "test/", "step", "epoch")


def read_curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The points of every metric.

    Args:
        folder: Holds `version_0`, `version_1` …, one for each resume; where two have the same
            step, the later one counts, because it replaced what was lost. A version with metrics of
            validation or test alone belongs to an evaluation, whose steps mean nothing, and is
            left out.

    Returns:
        Points (step, value) by metric, in the order of the steps.
    """
    points: dict[str, dict[int, float]] = defaultdict(dict)
    files = sorted(Path(folder).glob("version_*/metrics.csv"), key=_version)
    for file in files:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            if all(name.startswith(_EVALUATED) for name in rows.fieldnames or ()):
                continue
            for row in rows:
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        points[name][int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in points.items()}


def _version(file: Path) -> int:
    return int(file.parent.name.removeprefix("version_"))
