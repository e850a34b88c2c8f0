"""TorchScript: a traced module that maps normalized images to logits."""

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobileone.export.preprocess import pixels_runner, tensor_interface
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.safe_pickle import UnsafeFileError

__all__ = ["deprecation_ignored", "load", "operations", "runner", "spec", "write"]

_SPEC = "spec.json"
_ON_FILES = re.compile(r"\b(save|from_file)\s*\(")


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
        traced = torch.jit.trace(model, example, check_trace=False)
        # through memory: on a full disk PyTorch's own writer ends the process, Python's raises
        contents = io.BytesIO()
        torch.jit.save(traced, contents, _extra_files={_SPEC: spec.to_json()})
    path.write_bytes(contents.getbuffer())
    return tensor_interface(spec, outputs)


def load(path: Path) -> nn.Module:
    """Load what `write` saved, on the CPU, in eval mode.

    Raises:
        UnsafeFileError: the file calls functions that open files.
        ValueError: it is damaged.
    """
    return _load(path).eval()


def spec(path: Path) -> ExportSpec:
    """The file's own metadata."""
    extra = {_SPEC: ""}
    _load(path, extra)
    return ExportSpec.from_json(extra[_SPEC])


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The file as a function: 8-bit images (N, C, H, W) -> logits (N, classes)."""
    return pixels_runner(load(path), spec)


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the file."""
    graph: Any = load(path).inlined_graph  # torch._C.Graph, which is not typed
    nodes = graph.nodes()
    return Counter(node.kind() for node in nodes if not node.kind().startswith("prim::"))


def _load(path: Path, extra: dict[str, Any] | None = None) -> Any:
    """Load a file of any origin: TorchScript runs no Python, but it has functions on files."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, or no TorchScript file ({first})") from error
    for name in reader.get_all_records():
        if name.startswith("code/") and name.endswith(".py"):
            if found := _ON_FILES.search(reader.get_record(name).decode(errors="replace")):
                raise UnsafeFileError(
                    f"{path} calls {found[1]!r}, a function that opens files: refused. Export the "
                    "checkpoint again: mobileone export CHECKPOINT FOLDER"
                )
    with deprecation_ignored():
        return torch.jit.load(path, map_location="cpu", _extra_files=extra)


@contextmanager
def deprecation_ignored() -> Iterator[None]:
    """PyTorch points at torch.export; the TorchScript file is for runtimes that read only this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        yield
