"""What the page says of a run: curves, artifacts, confusions, images of highest loss."""

import base64
import csv
import shlex
from pathlib import Path
from typing import Any

import torch

from callbacks.report.figures import confusion_figure, curve_figures, read_curves
from callbacks.report.worst_images import WorstImage, read_worst
from lightning_modules.report.html import (
    Html,
    details,
    figure_image,
    note,
    png_image,
    section,
    table,
    text,
)
from mobileone.export.manifest import MANIFEST_NAME, Manifest

__all__ = ["run_facts", "run_sections"]

_CONFUSIONS = 10
_DRAWN = 60  # classes; more cannot be told apart in a picture


def run_facts(run: Path) -> dict[str, str]:
    """A few figures for the head of the page: what it is -> how much."""
    facts = {}
    curves = read_curves(run / "metrics")
    if points := curves.get("val/acc1"):
        step, best = max(points, key=lambda point: point[1])
        facts[f"top-1, best of {len(points)} validation(s), step {step}"] = f"{100 * best:.1f} %"
    manifest = _manifest(run / "checkpoints" / "best")
    if isinstance(manifest, Manifest):
        facts["parameters deployed"] = f"{manifest.parameters / 1e6:.2f} M"
        for name, entry in manifest.formats.items():
            facts[f"{name} file"] = _megabytes(entry["bytes"])
    return facts


def run_sections(run: Path) -> list[tuple[str, Html]]:
    """Sections of the page.

    Args:
        run: A run folder.
    """
    return [
        section("Training", _training(run)),
        section("Artifacts", _artifacts(run)),
        section("Confusions", _confusions(run)),
        section("Images of highest loss", _worst(run)),
    ]


def _training(run: Path) -> list[Html]:
    curves = read_curves(run / "metrics")
    figures = curve_figures(curves)
    if not figures:
        parts = [note("No curves: the run has logged nothing yet to metrics/version_*/.")]
    else:
        images = (figure_image(f, f"{title} over the steps") for title, f in figures.items())
        parts = [Html(f'<div class="panels">{"".join(images)}</div>')]
    config = run / "config.yaml"
    if config.is_file():
        parts.append(details("configuration", config.read_text(encoding="utf-8")))
    else:
        parts.append(note("No config.yaml in the run folder: its training has not started."))
    return parts


def _artifacts(run: Path) -> list[Html]:
    parts: list[Html] = []
    folder = run / "checkpoints"
    for name in ("best", "last"):
        manifest = _manifest(folder / name)
        if isinstance(manifest, str):
            parts.append(note(f"No artifact of the {name} checkpoint: {manifest}"))
            continue
        training = manifest.training
        top1 = training.metrics.get("val/acc1")
        quoted = "" if top1 is None else f", validation top-1 {100 * top1:.1f} %"
        epoch = "?" if training.epoch is None else training.epoch + 1
        where = f"{name}: {manifest.spec.model_name}, epoch {epoch}, step {training.step}{quoted}"
        parts.append(Html(f"<h3>{text(where)}</h3>"))
        rows = [_format_row(key, entry) for key, entry in manifest.formats.items()]
        parts.append(table(_ARTIFACT_COLUMNS, rows))
        images = {"given": "validation images", "synthetic": "synthetic images"}
        parts.append(
            Html(
                '<p class="soft">Parity: the file, run on '
                f"{text(images.get(manifest.images, manifest.images))}, against the checkpoint's "
                "own network. The error is relative, the largest of all.</p>"
            )
        )
    rejected = sorted(path.name for path in folder.glob("*.rejected"))
    if rejected:
        parts.append(note(f"Rejected, not published: {', '.join(rejected)}"))
    return parts


_ARTIFACT_COLUMNS = {
    "format": "format",
    "file": "file",
    "size": "size",
    "status": "parity",
    "error": "largest error",
    "tolerance": "tolerance",
    "agreement": "same top-1",
    "images": "images",
}


def _format_row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    parity = entry.get("parity", {})
    error = next((v for k, v in parity.items() if k.startswith("max_")), None)
    agreement = parity.get("top1_agreement")
    return {
        "format": name,
        "file": entry["path"],
        "size": _megabytes(entry["bytes"]),
        "status": parity.get("status", "not measured"),
        "error": error,
        "tolerance": parity.get("tolerance"),
        "agreement": None if agreement is None else f"{100 * agreement:.0f} %",
        "images": parity.get("images"),
    }


def _confusions(run: Path) -> list[Html]:
    path = run / "report" / "confusion_matrix.csv"
    if not path.is_file():
        return [note(_needs_test("There is no confusion matrix", run))]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            (_, *names), *rows = list(csv.reader(file))
        counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows])
        if counts.shape != (len(names), len(names)):
            raise ValueError(f"{tuple(counts.shape)} counts for {len(names)} classes")
    except ValueError as error:
        return [note(f"{path.name} cannot be read: {error}")]
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    parts = [Html(f"<p>Test: {right} of {total} images right, {right / max(total, 1):.1%}.</p>")]
    if len(names) <= _DRAWN:
        drawn = figure_image(confusion_figure(counts, names), "confusion matrix")
        parts.append(Html(f'<div class="medium">{drawn}</div>'))
    else:
        parts.append(note(f"{len(names)} classes are too many to draw; the file {path.name} has "
                          "all counts."))  # fmt: skip
    wrong = counts.clone().fill_diagonal_(0)
    values, places = wrong.flatten().topk(min(_CONFUSIONS, wrong.numel()))
    confused = [
        {"true": names[place // len(names)], "predicted": names[place % len(names)], "count": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value
    ]
    if confused:
        parts.append(Html("<h3>most frequent confusions</h3>"))
        columns = {"true": "true", "predicted": "predicted", "count": "images"}
        parts.append(table(columns, confused))
    return parts


def _worst(run: Path) -> list[Html]:
    for name, split in (("worst_test", "test"), ("worst", "last validation")):
        path = run / "report" / f"{name}.json"
        if not path.is_file():
            continue
        try:
            images = read_worst(path)
        except ValueError as error:
            return [note(error)]
        return [
            Html(f'<p class="soft">Of the {split}, as the network saw them, the worst first.</p>'),
            Html(f'<div class="worst">{"".join(map(_worst_figure, images))}</div>'),
        ]
    return [note(_needs_test("There are no images of highest loss", run))]


def _worst_figure(image: WorstImage) -> str:
    wrong = image.predicted != image.true
    verdict = f"✗ {image.predicted}" if wrong else f"✓ {image.predicted}"
    known = f"true: {image.true} ({image.probability_true:.0%})" if wrong else "right, but unsure"
    shown = png_image(base64.b64decode(image.png), f"{image.true}, taken for {image.predicted}")
    return (
        f"<figure>{shown}<figcaption><b>{text(verdict)}</b> {image.probability:.0%}<br>"
        f"{text(known)}<br>loss {image.loss:.2f}</figcaption></figure>"
    )


def _needs_test(what: str, run: Path) -> str:
    best = shlex.quote(f"{run.name}/checkpoints/best.ckpt")
    return f"{what}: `mobileone test --ckpt_path …/{best}` writes it into the run folder."


def _manifest(folder: Path) -> Manifest | str:
    """The manifest, or why there is none."""
    if not (folder / MANIFEST_NAME).is_file():
        return "the run has not published one."
    try:
        return Manifest.load(folder)
    except ValueError as error:
        return str(error)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}\u00a0MB"
