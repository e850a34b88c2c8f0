"""LiteRT: a `.tflite` file, from pixels to probabilities, one image at a time.

Needs the extra `litert`; its packages are imported by the functions that use them.
"""

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.formats.flatbuffer import Table
from mobileone.export.preprocess import for_device, one_by_one
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = [
    "EXTRA",
    "NEEDS",
    "finished",
    "interpreter",
    "operations",
    "runner",
    "spec",
    "write",
]

NEEDS = ("litert-torch>=0.10,<0.11",)
EXTRA = "mobileone-lightning[litert]"
_USE = "the `litert` format"
_SPEC, _LABELS = "spec.json", "labels.txt"


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    outputs: Sequence[str] | None = None,
    *,
    quantized: bool = False,
) -> dict[str, Any]:
    """Convert `model` and save it to `path`; see `finished` for what goes along.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects.
        path: file to write.
        metadata: not stored; the manifest keeps it.
        outputs: names of what the model returns; None for a classifier.
        quantized: the model rounds its weights and activations: the file is of integers.

    Returns:
        Description of the input and the output for the manifest.

    Raises:
        ImportError: the extra is not installed.
    """
    plain, given, names, interface = for_device(model, spec, outputs)
    network = _Named(plain, names).eval()
    with quiet():
        litert = import_optional("litert_torch", _USE, EXTRA)
        litert.progress.config.show_progress = False
        # JAX, which the converter uses, would warn each time that a loader starts its workers
        bridge: Any = import_optional("jax._src.xla_bridge", _USE, EXTRA)
        bridge._at_fork_handler_installed = True
        config = _static() if quantized else None
        converted = litert.convert(network, sample_kwargs=given, quant_config=config)
        contents = converted.model_content()
    path.write_bytes(finished(contents, spec))
    return interface


def _static() -> Any:
    """What tells the converter to make integers of rounded numbers; it estimates no scale."""
    quantizers = import_optional("litert_torch.quantize.pt2e_quantizer", _USE, EXTRA)
    configs = import_optional("litert_torch.quantize.quant_config", _USE, EXTRA)
    chosen = quantizers.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
    return configs.QuantConfig(pt2e_quantizer=quantizers.PT2EQuantizer().set_global(chosen))


def finished(contents: bytes, spec: ExportSpec) -> bytes:
    """A model with `spec.json` and `labels.txt` in the place of TensorFlow Lite's associated files.

    They follow the model as a zip archive, which the runtimes ignore and `unzip` reads.
    """
    archive = io.BytesIO(contents)
    with zipfile.ZipFile(archive, "a") as files:
        files.writestr(_SPEC, spec.to_json())
        files.writestr(_LABELS, "\n".join(spec.class_names))
    return archive.getvalue()


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The file as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes).

    Raises:
        ImportError: the extra is not installed.
    """
    with quiet():
        opened = interpreter(path)
    (given,) = opened.get_input_details()
    returned = sorted(opened.get_output_details(), key=lambda output: str(output["name"]))

    def run(image: Tensor) -> list[Tensor]:
        opened.set_tensor(given["index"], image.float().numpy())
        opened.invoke()
        return [torch.from_numpy(opened.get_tensor(output["index"])) for output in returned]

    return one_by_one(run)


def interpreter(path: Path, threads: int | None = None) -> Any:
    """LiteRT's interpreter of a file, ready to run.

    Raises:
        ImportError: the extra is not installed.
    """
    runtime = import_optional("ai_edge_litert.interpreter", _USE, EXTRA)
    opened = runtime.Interpreter(str(path), num_threads=threads or torch.get_num_threads())
    opened.allocate_tensors()
    return opened


def spec(path: Path) -> ExportSpec:
    """The file's own metadata.

    Raises:
        ValueError: there is none, or `labels.txt`, which apps read, has other names.
    """
    try:
        with zipfile.ZipFile(path) as files:
            text, labels = files.read(_SPEC), files.read(_LABELS).decode()
    except (zipfile.BadZipFile, KeyError):
        text, labels = b"", ""
    found = ExportSpec.from_json(text)
    if labels != "\n".join(found.class_names):
        raise ValueError(f"{_LABELS} in {path.name} has other class names than its {_SPEC}")
    return found


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the file.

    Raises:
        ImportError: the extra, which has the operations' names, is not installed.
    """
    schema = import_optional("ai_edge_litert.schema_py_generated", _USE, EXTRA)
    names = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    model = Table(path.read_bytes())
    kinds = [max(code.number(0, "b"), code.number(3, "i")) for code in model.tables(1)]
    return Counter(
        str(names[kinds[operator.number(0)]]).lower()
        for graph in model.tables(2)
        for operator in graph.tables(3)
    )


class _Named(nn.Module):
    """A model that returns its outputs by name, which become the file's."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model(image)
        tensors = (found,) if isinstance(found, Tensor) else found
        return dict(zip(self.names, tensors, strict=True))
