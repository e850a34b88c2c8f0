"""What the page shows of a run: curves, artifacts, confusions, images of highest loss."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from callbacks.report.figures import confusion_figure, curve_figures, read_curves
from mobileone.bench.show.charts import write_figure
from mobileone.export.manifest import MANIFEST_NAME, Manifest

__all__ = ["read_run"]

_CONFUSIONS = 10
_DRAWN = 60  # classes; more cannot be distinguished in a picture


def read_run(run: Path) -> dict[str, Any]:
    """Everything that the page shows of a run folder.

    Returns:
        `name`; `facts` for the head of the page, how much by what it is; `charts`, PNG by title;
        `config`, text or None; `artifacts`, the manifest, or the reason why there is none, by
        `best` and `last`; `rejected`, names; `confusions`, None where no test was run, or the
        reason why the file cannot be read; `worst`, the picture and of which split, or None.
    """
    curves = read_curves(run / "metrics")
    config = run / "config.yaml"
    checkpoints = run / "checkpoints"
    artifacts = {name: _manifest(checkpoints / name) for name in ("best", "last")}
    return {
        "name": run.name,
        "facts": _facts(curves, artifacts["best"]),
        "charts": {title: _png(figure) for title, figure in curve_figures(curves).items()},
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
        "artifacts": artifacts,
        "rejected": sorted(path.name for path in checkpoints.glob("*.rejected")),
        "confusions": _confusions(run / "report" / "confusion_matrix.csv"),
        "worst": _worst(run / "report"),
    }


def _facts(
    curves: Mapping[str, list[tuple[int, float]]], manifest: Manifest | str
) -> dict[str, str]:
    facts = {}
    if points := curves.get("val/acc1"):
        step, best = max(points, key=lambda point: point[1])
        facts[f"top-1, best of {len(points)} validation(s), step {step}"] = f"{100 * best:.1f} %"
    if isinstance(manifest, Manifest):
        facts["parameters deployed"] = f"{manifest.parameters / 1e6:.2f} M"
        for name, entry in manifest.formats.items():
            facts[f"{name} file"] = f"{entry['bytes'] / 1e6:.2f}\u00a0MB"
    return facts


def _manifest(folder: Path) -> Manifest | str:
    if not (folder / MANIFEST_NAME).is_file():
        return "the run has not published one."
    try:
        return Manifest.load(folder)
    except ValueError as error:
        return str(error)


def _confusions(path: Path) -> dict[str, Any] | str | None:
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            (_, *names), *rows = list(csv.reader(file))
        counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows])
        if counts.shape != (len(names), len(names)):
            raise ValueError(f"{tuple(counts.shape)} counts for {len(names)} classes")
    except ValueError as error:
        return f"{path.name} cannot be read: {error}"
    wrong = counts.clone().fill_diagonal_(0)
    values, places = wrong.flatten().topk(min(_CONFUSIONS, wrong.numel()))
    most = [
        {"true": names[place // len(names)], "predicted": names[place % len(names)], "count": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value
    ]
    return {
        "right": int(counts.diagonal().sum()),
        "total": int(counts.sum()),
        "png": _png(confusion_figure(counts, names)) if len(names) <= _DRAWN else None,
        "most": most,
    }


def _worst(folder: Path) -> dict[str, Any] | None:
    for name, split in (("worst_test", "test"), ("worst", "last validation")):
        if (path := folder / f"{name}.png").is_file():
            return {"split": split, "png": path.read_bytes()}
    return None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    write_figure(figure, buffer)
    return buffer.getvalue()
