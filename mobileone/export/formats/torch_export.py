"""torch.export: a `.pt2` program of normalized images to logits, or pixels to probabilities."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mobileone.export.formats.archive import extra_text
from mobileone.export.formats.pt2_reader import load_program
from mobileone.export.preprocess import interfaced, tensor_interface, tensor_runner
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner

__all__ = ["operations", "program_of", "runner", "spec", "write"]

_SPEC = "spec.json"


def program_of(model: nn.Module, spec: ExportSpec) -> ExportedProgram:
    """Export `model` with a free batch size, at least 1."""
    example = torch.zeros(2, *spec.input_size)  # a batch of 1 would be taken for fixed
    return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    outputs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Export `model` and save it to `path`; `spec` goes along as the extra file `spec.json`.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects.
        path: file to write.
        metadata: not stored; the manifest keeps it.
        outputs: names of what the model returns; None for logits.

    Returns:
        Description of the input and the output for the manifest.
    """
    extra = {_SPEC: spec.to_json()}
    # through memory: on a full disk PyTorch's own writer ends the process, Python's raises
    contents = io.BytesIO()
    program = program_of(interfaced(model, spec, outputs), spec)
    torch.export.save(program, contents, extra_files=extra)
    path.write_bytes(contents.getbuffer())
    return tensor_interface(spec, outputs)


def spec(path: Path) -> ExportSpec:
    """The file's own metadata."""
    return ExportSpec.from_json(extra_text(path, _SPEC, ".pt2"))


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The file as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes)."""
    return tensor_runner(load_program(path).module(), spec)


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the file."""
    nodes = load_program(path).graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")
