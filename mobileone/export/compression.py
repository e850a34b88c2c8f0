"""Smaller files: quantised weights for Core ML, 8-bit arithmetic for ONNX, and what they cost.

A method is a row of `METHODS`. Reparameterized networks lose more to 8 bits than others, because
folding gives neighbouring channels very different ranges; per-channel weights and equalised
ranges (`equalise.py`) are what mends it here.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mobileone.deploy import reparameterize
from mobileone.export import coreml, onnx
from mobileone.export.equalise import equalise
from mobileone.export.extras import need
from mobileone.export.isolation import isolated
from mobileone.export.manifest import describe_files
from mobileone.export.metadata import Metadata
from mobileone.export.parity import Runner
from mobileone.export.preprocess import normalise
from mobileone.export.publish import publish_folder, staging
from mobileone.export.quiet import quiet
from mobileone.export.spec import ExportSpec

__all__ = ["METHODS", "Method", "Row", "compress_model"]


@dataclass(frozen=True)
class Method:
    """One way to make a file smaller.

    Attributes:
        filename: of what it writes.
        base: `coreml` or `onnx`, the file that it starts from.
        compress: writes the second path from the first; gets calibration images, normalised.
        equalised: equalise the network's weight ranges first.
    """

    filename: str
    base: str
    compress: Callable[[Path, Path, Tensor], None]
    equalised: bool = False


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
        methods: names from `METHODS`; None takes all.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: an unknown method.
        ImportError: a package is missing; names the pip command.
    """
    chosen = list(METHODS) if methods is None else list(methods)
    if unknown := sorted(set(chosen) - set(METHODS)):
        raise ValueError(f"unknown methods {unknown}: choose from {list(METHODS)}")
    if directory.exists():
        raise FileExistsError(f"{directory} exists: choose another folder")
    with isolated(), staging(directory.parent) as folder, tempfile.TemporaryDirectory() as scratch:
        staged = folder / "compressed"
        staged.mkdir()
        fused = reparameterize(model)
        expected = model(normalise(images, spec)).softmax(dim=1)
        size = 4 * sum(p.numel() for p in fused.parameters())
        rows = [_row("float32", size, expected, expected, targets)]
        bases = _Bases(fused, spec, Path(scratch))
        for name in chosen:
            method, path = METHODS[name], staged / METHODS[name].filename
            source = bases.get(method.base, method.equalised)
            method.compress(source, path, normalise(calibration, spec))
            run = _RUNNERS[method.base](path, spec)
            answers = run(images) if method.base == "coreml" else run(images).softmax(dim=1)
            written = sum(file["bytes"] for file in describe_files(path).values())
            rows.append(_row(name, written, answers, expected, targets))
        table = {"model": spec.model_name, "images": len(images), "rows": [asdict(r) for r in rows]}
        (staged / "compression.json").write_text(json.dumps(table, indent=2) + "\n")
        publish_folder(staged, directory)
    return rows


class _Bases:
    """The files that methods start from, each written once."""

    def __init__(self, fused: nn.Module, spec: ExportSpec, folder: Path) -> None:
        self._fused, self._spec, self._folder = fused, spec, folder

    def get(self, base: str, equalised: bool) -> Path:
        suffix = {"coreml": "mlpackage", "onnx": "onnx"}[base]
        path = self._folder / f"{'equalised' if equalised else 'plain'}.{suffix}"
        if not path.exists():
            model = equalise(self._fused) if equalised else self._fused
            write = {"coreml": coreml.write, "onnx": onnx.write}[base]
            write(model, self._spec, path, Metadata())
        return path


def _row(name: str, size: int, answers: Tensor, expected: Tensor, targets: Tensor) -> Row:
    classes = answers.argmax(dim=1)
    return Row(
        name,
        size,
        float((classes == targets).double().mean()),
        float((classes == expected.argmax(dim=1)).double().mean()),
        float((answers - expected).abs().max()),
    )


# -- The methods ------------------------------------------------------------------------------


def _quantise_weights(source: Path, path: Path, calibration: Tensor) -> None:
    """8-bit integers and one scale an output channel."""

    def work(optimize: Any, mlmodel: Any) -> Any:
        config = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", granularity="per_channel"
        )
        return optimize.linear_quantize_weights(
            mlmodel, optimize.OptimizationConfig(global_config=config)
        )

    _rewrite(source, path, work)


def _palettize(source: Path, path: Path, calibration: Tensor, *, bits: int) -> None:
    """Indices into a table of 2^bits values a layer, by k-means."""

    def work(optimize: Any, mlmodel: Any) -> Any:
        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
        return optimize.palettize_weights(
            mlmodel, optimize.OptimizationConfig(global_config=config)
        )

    _rewrite(source, path, work)


def _rewrite(source: Path, path: Path, work: Callable[[Any, Any], Any]) -> None:
    with quiet():
        ct = need("coremltools", "Core ML compression", "coremltools")
        optimize = need("coremltools.optimize.coreml", "Core ML compression", "coremltools")
        work(optimize, ct.models.MLModel(str(source), skip_model_load=True)).save(str(path))


def _quantise_static(source: Path, path: Path, calibration: Tensor, *, per_channel: bool) -> None:
    """8-bit weights and activations, ranges from the calibration images."""
    quantization = need("onnxruntime.quantization", "ONNX int8", onnx.EXTRA)
    prepared = source.with_name(f"prepared-{path.name}")
    quantization.quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        _Reader(calibration),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


class _Reader:
    """Calibration images as onnxruntime asks for them, one by one."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"images": image[None].numpy()}


_RUNNERS: dict[str, Callable[[Path, ExportSpec], Runner]] = {
    "coreml": coreml.runner,
    "onnx": onnx.runner,
}

METHODS = {
    "coreml_int8": Method("model.int8.mlpackage", "coreml", _quantise_weights),
    "coreml_palette8": Method("model.8bit.mlpackage", "coreml", partial(_palettize, bits=8)),
    "coreml_palette6": Method("model.6bit.mlpackage", "coreml", partial(_palettize, bits=6)),
    "coreml_palette4": Method("model.4bit.mlpackage", "coreml", partial(_palettize, bits=4)),
    "onnx_int8_tensor": Method(
        "model.int8-tensor.onnx", "onnx", partial(_quantise_static, per_channel=False)
    ),
    "onnx_int8_tensor_equalised": Method(
        "model.int8-tensor-equalised.onnx",
        "onnx",
        partial(_quantise_static, per_channel=False),
        equalised=True,
    ),
    "onnx_int8": Method("model.int8.onnx", "onnx", partial(_quantise_static, per_channel=True)),
    "onnx_int8_equalised": Method(
        "model.int8-equalised.onnx",
        "onnx",
        partial(_quantise_static, per_channel=True),
        equalised=True,
    ),
    "coreml_palette4_equalised": Method(
        "model.4bit-equalised.mlpackage", "coreml", partial(_palettize, bits=4), equalised=True
    ),
}
