"""Figures for people who would rather look than read: sample predictions, confusion matrix."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["confusion_figure", "samples_figure"]

_RIGHT, _WRONG = "#0072b2", "#d55e00"  # Okabe and Ito: told apart by the colour-blind


def samples_figure(
    images: Tensor, targets: Tensor, probabilities: Tensor, class_names: Sequence[str]
) -> Figure:
    """Images with the predicted class and its probability; mistakes say what is true.

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


def _short(name: str, length: int = 18) -> str:
    plain = name.replace("$", r"\$")  # matplotlib reads a pair of dollars as a formula
    return plain if len(plain) <= length else plain[: length - 1] + "…"
