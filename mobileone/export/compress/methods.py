"""Smaller files: quantized weights for Core ML, 8-bit arithmetic for ONNX, and what they cost.

A method is a row of `METHODS`: a plain one, and what may mend it. Reparameterized networks lose
more to 8 bits than others; per-channel weights, equalized ranges (`equalize.py`) and corrected
biases (`correct.py`) bring most of it back.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mobileone.export.compress import coreml as compress_coreml
from mobileone.export.compress import onnx as compress_onnx
from mobileone.export.compress.equalize import equalize
from mobileone.export.formats import coreml, onnx
from mobileone.export.isolation import isolated
from mobileone.export.manifest import describe_files
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.atomic import publish_folder, staging
from mobileone.reparameterize import reparameterize

__all__ = ["DEFAULT_METHODS", "METHODS", "Method", "Row", "compress_model"]


_CORRECTED = "_corrected"  # how the name of a method ends that corrects biases

# Writes the second path from the first; gets calibration images, normalized
Compress = Callable[[Path, Path, Tensor], None]


@dataclass(frozen=True)
class Method:
    """One way to make a file smaller.

    Attributes:
        kind: `coreml` or `onnx`, the file that it starts from.
        compress: writes the smaller file.
        equalized: equalize the network's weight ranges first (`equalize.py`).
        corrected: correct the biases afterwards (`correct.py`).
    """

    kind: str
    compress: Compress
    equalized: bool
    corrected: bool


@dataclass(frozen=True)
class _Kind:
    """A kind of file: how it is called, written, run, and corrected."""

    suffix: str
    write: Callable[[nn.Module, ExportSpec, Path, Metadata], Any]
    runner: Callable[[Path, ExportSpec], Runner]
    correct: Callable[[Compress, nn.Module, ExportSpec, Path, Path, Tensor], None]


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
        directory: must not exist; gets `compression.json` beside the files.
        calibration: 8-bit training images (M, C, H, W), for methods that need activations.
        images: 8-bit validation images (N, C, H, W).
        targets: their classes, (N,).
        methods: names from `METHODS`; None takes `DEFAULT_METHODS`.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: an unknown method.
        ImportError: a package is missing; names the pip command.
    """
    chosen = list(DEFAULT_METHODS if methods is None else methods)
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
        networks = {False: fused}
        if any(METHODS[name].equalized for name in chosen):
            networks[True] = equalize(fused)
        inputs = normalize(calibration, spec)
        for name in chosen:
            method, kind = METHODS[name], _KINDS[METHODS[name].kind]
            network = networks[method.equalized]
            source = Path(scratch) / f"{('plain', 'equalized')[method.equalized]}{kind.suffix}"
            if not source.exists():
                kind.write(network, spec, source, Metadata())
            path = staged / f"{name}{kind.suffix}"
            plain = staged / f"{name.removesuffix(_CORRECTED)}{kind.suffix}"
            if method.corrected and plain.exists():
                _copy(plain, path)
            else:
                method.compress(source, path, inputs)
            if method.corrected:
                kind.correct(method.compress, network, spec, source, path, inputs)
            answers = kind.runner(path, spec)(images)
            if method.kind == "onnx":
                answers = answers.softmax(dim=1)
            written = sum(file["bytes"] for file in describe_files(path).values())
            rows.append(_row(name, written, answers, expected, targets))
        table = {"model": spec.model_name, "images": len(images), "rows": [asdict(r) for r in rows]}
        (staged / "compression.json").write_text(json.dumps(table, indent=2) + "\n")
        publish_folder(staged, directory)
    return rows


def _copy(source: Path, path: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copy(source, path)


def _row(name: str, size: int, answers: Tensor, expected: Tensor, targets: Tensor) -> Row:
    classes = answers.argmax(dim=1)
    return Row(
        name,
        size,
        float((classes == targets).double().mean()),
        float((classes == expected.argmax(dim=1)).double().mean()),
        float((answers - expected).abs().max()),
    )


_KINDS = {
    "coreml": _Kind(".mlpackage", coreml.write, coreml.runner, compress_coreml.correct),
    "onnx": _Kind(".onnx", onnx.write, onnx.runner, compress_onnx.correct),
}

_PLAIN: dict[str, tuple[str, Compress]] = {
    "coreml_int8": ("coreml", compress_coreml.quantize_weights),
    "coreml_palette8": ("coreml", partial(compress_coreml.palettize, bits=8)),
    "coreml_palette6": ("coreml", partial(compress_coreml.palettize, bits=6)),
    "coreml_palette4": ("coreml", partial(compress_coreml.palettize, bits=4)),
    "onnx_int8_tensor": ("onnx", partial(compress_onnx.quantize, per_channel=False)),
    "onnx_int8": ("onnx", partial(compress_onnx.quantize, per_channel=True)),
}

METHODS = {
    f"{name}{'_equalized' * equalized}{_CORRECTED * corrected}": Method(
        kind, compress, equalized, corrected
    )
    for name, (kind, compress) in _PLAIN.items()
    for equalized in (False, True)
    for corrected in (False, True)
}
# ranges made equal do not help where activations stay float16 (docs/compression.md)
DEFAULT_METHODS = tuple(n for n, m in METHODS.items() if m.kind == "onnx" or not m.equalized)
