"""Smaller files without training: every format of integers, palettes of weights, their cost.

Reparameterized networks lose more to 8 bits than others: noise-aware folding brings it back
(docs/quantization.md). Palettes of 4 bits need corrected biases (`coreml.correct_biases`).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from mobileone.export.artifact import RejectedError
from mobileone.export.compress.coreml import write_palettes
from mobileone.export.formats.table import DEFAULT_INTEGER_FORMATS, FORMATS, check_packages
from mobileone.export.isolation import isolated
from mobileone.export.manifest import describe_files
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Reference
from mobileone.io.atomic import publish_folder, replace_text, staging
from mobileone.quantization import quantize_trained, scheme_of
from mobileone.reparameterize import reparameterize

__all__ = ["PALETTES", "Row", "compress_model", "methods"]

PALETTES = {"coreml_palette6": (6, False), "coreml_palette4_corrected": (4, True)}
"""Bits of an index, and whether biases are corrected."""

_COMPARED = 128  # images at most, with the network that a file is written from


@dataclass(frozen=True)
class Row:
    """What a method costs and gains.

    Attributes:
        method: its name; `float32` is the network itself.
        bytes: size on the disk.
        accuracy: top-1 on the validation images, 0..1.
        agreement: share of the images given the network's own class.
        worst_error: the validation images' largest difference of a probability.
    """

    method: str
    bytes: int
    accuracy: float
    agreement: float
    worst_error: float


def methods() -> list[str]:
    """The names of all methods: palettes, and the formats of integers."""
    return [*PALETTES, *(name for name, row in FORMATS.items() if row.integers)]


def compress_model(
    model: nn.Module,
    spec: ExportSpec,
    directory: Path,
    calibration: Tensor,
    images: Tensor,
    targets: Tensor,
    names: Iterable[str] | None = None,
) -> list[Row]:
    """Write a file a method into the new folder `directory`, and measure each.

    Args:
        model: the trained network in eval mode, on the CPU, float32.
        spec: what it expects.
        directory: must not exist; gets `compression.json` next to the files.
        calibration: 8-bit training images (M, C, H, W), for scales and biases.
        images: 8-bit validation images (N, C, H, W).
        targets: their classes, (N,).
        names: of `methods()`; None takes the palettes and `DEFAULT_INTEGER_FORMATS`.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: an unknown method, or a network of integers.
        ImportError: a package is missing; names the pip command.
        RejectedError: an integer file is not the network that it was written from.
    """
    chosen = list((*PALETTES, *DEFAULT_INTEGER_FORMATS) if names is None else names)
    if unknown := sorted(set(chosen) - set(methods())):
        raise ValueError(f"unknown methods {unknown}: choose from {methods()}")
    if scheme_of(model) is not None:
        raise ValueError(
            "the network was trained as integers, which its files have already: write them by "
            "`mobileone export`, or compress the checkpoint of the float network"
        )
    check_packages("coreml" if name in PALETTES else name for name in chosen)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: choose another folder")
    with isolated(), staging(directory.parent) as folder:
        staged = folder / "compressed"
        staged.mkdir()
        fused = reparameterize(model)
        expected = model(normalize(images, spec)).softmax(dim=1)
        size = 4 * sum(p.numel() for p in fused.parameters())
        rows = [_row("float32", size, expected, expected, targets)]
        inputs = normalize(calibration, spec)
        integers = None
        for name in chosen:
            row = FORMATS["coreml" if name in PALETTES else name]
            path = staged / f"{name}{Path(row.filename).suffix}"
            if name in PALETTES:
                bits, corrected = PALETTES[name]
                write_palettes(fused, spec, path, inputs if corrected else None, bits=bits)
            else:
                integers = integers or quantize_trained(
                    model, inputs.split(32), mean=spec.mean, std=spec.std
                )
                row.write(integers, spec, path, Metadata())
                some = images[:: -(-len(images) // _COMPARED)]  # they are sorted by class
                _check(name, path, spec, integers, some)
            output = row.runner(path, spec)(images)
            probabilities = output.softmax(dim=1) if row.output == "logits" else output
            written = sum(file["bytes"] for file in describe_files(path).values())
            rows.append(_row(name, written, probabilities, expected, targets))
        table = {"model": spec.model_name, "images": len(images), "rows": [asdict(r) for r in rows]}
        replace_text(staged / "compression.json", json.dumps(table, indent=2) + "\n")
        publish_folder(staged, directory)
    return rows


def _check(name: str, path: Path, spec: ExportSpec, network: nn.Module, images: Tensor) -> None:
    """Make sure that a file is the network of integers; what it loses is in the table."""
    reference = Reference(network, {"logits": network(normalize(images, spec))}, images)
    for check, parity in FORMATS[name].compare(path, spec, reference).items():
        if problem := parity.problem():
            raise RejectedError(f"{name}: {check.replace('_', ' ')}: {problem}")


def _row(name: str, size: int, answers: Tensor, expected: Tensor, targets: Tensor) -> Row:
    classes = answers.argmax(dim=1)
    return Row(
        name,
        size,
        float((classes == targets).double().mean()),
        float((classes == expected.argmax(dim=1)).double().mean()),
        float((answers - expected).abs().max()),
    )
