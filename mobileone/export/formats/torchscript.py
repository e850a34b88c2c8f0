"""TorchScript: a traced module of normalized images to logits, or pixels to probabilities."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobileone.export.formats.archive import extra_text
from mobileone.export.formats.torchscript_reader import harmless_archive
from mobileone.export.preprocess import interfaced, tensor_interface, tensor_runner
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner

__all__ = ["deprecation_ignored", "load", "operations", "runner", "spec", "write"]

_SPEC = "spec.json"


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    outputs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trace `model` and save it to `path`, `spec` as an extra file; the batch size stays free.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects.
        path: file to write.
        metadata: not stored: TorchScript has no field for it; the manifest keeps it.
        outputs: names of what the model returns; None for logits.

    Returns:
        Description of the input and the output for the manifest.
    """
    example = torch.zeros(2, *spec.input_size)
    with deprecation_ignored():
        traced = torch.jit.trace(interfaced(model, spec, outputs), example, check_trace=False)
        # through memory: on a full disk PyTorch's own writer ends the process, Python's raises
        contents = io.BytesIO()
        torch.jit.save(traced, contents, _extra_files={_SPEC: spec.to_json()})
    path.write_bytes(contents.getbuffer())
    return tensor_interface(spec, outputs)


def load(path: Path) -> nn.Module:
    """Load what `write` saved, on the CPU, in eval mode.

    Raises:
        UnsafeFileError: the file could do more than compute.
        ValueError: it is damaged.
    """
    contents = harmless_archive(path)
    with deprecation_ignored():
        module: nn.Module = torch.jit.load(contents, map_location="cpu")
    return module.eval()


def spec(path: Path) -> ExportSpec:
    """The file's own metadata."""
    return ExportSpec.from_json(extra_text(path, _SPEC, "TorchScript"))


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The file as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes)."""
    return tensor_runner(load(path), spec)


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the file."""
    graph: Any = load(path).inlined_graph  # torch._C.Graph, which is not typed
    nodes = graph.nodes()
    return Counter(node.kind() for node in nodes if not node.kind().startswith("prim::"))


@contextmanager
def deprecation_ignored() -> Iterator[None]:
    """PyTorch points at torch.export; the TorchScript file is for runtimes that read only this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        yield
