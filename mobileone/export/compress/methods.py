"""Smaller files: quantized weights for Core ML, 8-bit arithmetic for ONNX, and what they cost.

Reparameterized networks lose more to 8 bits than others: per-channel weights and corrected biases
(`coreml.correct_biases`) bring most of it back, tables by k-means need 6 bits for it.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from mobileone.export.compress import coreml, onnx
from mobileone.export.formats.table import FORMATS
from mobileone.export.isolation import isolated
from mobileone.export.manifest import describe_files
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.io.atomic import publish_folder, replace_text, staging
from mobileone.reparameterize import reparameterize

__all__ = ["METHODS", "Method", "Row", "compress_model"]


@dataclass(frozen=True)
class Method:
    """One way to make a file smaller.

    Attributes:
        format: `coreml` or `onnx`, the format that it starts from.
        compress: writes the second path from the first; gets calibration images, normalized.
        correct: corrects the biases of the written file; None leaves them as they are.
    """

    format: str
    compress: Callable[[Path, Path, Tensor], None]
    correct: Callable[..., None] | None = None


METHODS = {
    "coreml_palette6": Method("coreml", partial(coreml.palettize, bits=6)),
    "coreml_palette4_corrected": Method(
        "coreml", partial(coreml.palettize, bits=4), coreml.correct
    ),
    "coreml_int8_corrected": Method("coreml", coreml.quantize_weights, coreml.correct),
    "onnx_int8_corrected": Method("onnx", onnx.quantize, onnx.correct),
}


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


def compress_model(
    model: nn.Module,
    spec: ExportSpec,
    directory: Path,
    calibration: Tensor,
    images: Tensor,
    targets: Tensor,
    methods: Iterable[str] | None = None,
) -> list[Row]:
    """Write a file a method into the new folder `directory`, and measure each.

    Args:
        model: the trained network in eval mode, on the CPU, float32.
        spec: what it expects.
        directory: must not exist; gets `compression.json` next to the files.
        calibration: 8-bit training images (M, C, H, W), for methods that need activations.
        images: 8-bit validation images (N, C, H, W).
        targets: their classes, (N,).
        methods: names from `METHODS`; None takes all.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: an unknown method.
        ImportError: a package is missing; names the pip command.
    """
    chosen = list(METHODS if methods is None else methods)
    if unknown := sorted(set(chosen) - set(METHODS)):
        raise ValueError(f"unknown methods {unknown}: choose from {list(METHODS)}")
    if directory.exists():
        raise FileExistsError(f"{directory} exists: choose another folder")
    with isolated(), staging(directory.parent) as folder, tempfile.TemporaryDirectory() as scratch:
        staged = folder / "compressed"
        staged.mkdir()
        fused = reparameterize(model)
        expected = model(normalize(images, spec)).softmax(dim=1)
        size = 4 * sum(p.numel() for p in fused.parameters())
        rows = [_row("float32", size, expected, expected, targets)]
        inputs = normalize(calibration, spec)
        for name in chosen:
            method, row = METHODS[name], FORMATS[METHODS[name].format]
            source = Path(scratch) / row.filename
            if not source.exists():
                row.write(fused, spec, source, Metadata())
            path = staged / f"{name}{source.suffix}"
            method.compress(source, path, inputs)
            if method.correct:
                method.correct(method.compress, fused, spec, source, path, inputs)
            output = row.runner(path, spec)(images)
            probabilities = output.softmax(dim=1) if row.output == "logits" else output
            written = sum(file["bytes"] for file in describe_files(path).values())
            rows.append(_row(name, written, probabilities, expected, targets))
        table = {"model": spec.model_name, "images": len(images), "rows": [asdict(r) for r in rows]}
        replace_text(staged / "compression.json", json.dumps(table, indent=2) + "\n")
        publish_folder(staged, directory)
    return rows


def _row(name: str, size: int, answers: Tensor, expected: Tensor, targets: Tensor) -> Row:
    classes = answers.argmax(dim=1)
    return Row(
        name,
        size,
        float((classes == targets).double().mean()),
        float((classes == expected.argmax(dim=1)).double().mean()),
        float((answers - expected).abs().max()),
    )
