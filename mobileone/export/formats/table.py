"""The table of formats: a new one is a file beside this one and a row here."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobileone.export.formats import coreml, onnx, torch_export, torchscript
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify import coreml as coreml_checks
from mobileone.export.verify.parity import Parity, Reference, Runner, check_logits

__all__ = ["DEFAULT_FORMATS", "FORMATS", "Format", "check_formats"]


@dataclass(frozen=True)
class Format:
    """How one kind of file is written, run, looked into and compared.

    Attributes:
        filename: name of the file or folder inside the artifact.
        output: `logits` or `probabilities`, what a runner returns.
        write: saves the fused float32 CPU model; returns the description of inputs and outputs.
        runner: loads the file as a function of 8-bit images (N, C, H, W); loading or running
            raises `NotVerifiedError` where the machine cannot run it.
        spec: what the file says of itself, so that it can be run without its artifact folder.
        operations: how often each operation stands in the file, by the format's own names.
        check: compares the file with the network, by name of the comparison; one of them is
            `parity`, and none above its tolerance is published.
    """

    filename: str
    output: str
    write: Callable[[nn.Module, ExportSpec, Path, Metadata], dict[str, Any]]
    runner: Callable[[Path, ExportSpec], Runner]
    spec: Callable[[Path], ExportSpec]
    operations: Callable[[Path], Counter[str]]
    check: Callable[[Path, ExportSpec, Reference], dict[str, Parity]]


def _tensors(filename: str, module: Any, tolerance: float) -> Format:
    """A row for files that return logits and run everywhere."""
    check = partial(check_logits, runner=module.runner, tolerance=tolerance)
    return Format(
        filename, "logits", module.write, module.runner, module.spec, module.operations, check
    )


def _coreml(filename: str, precision: coreml.Precision, tolerance: float) -> Format:
    """A row for an `.mlpackage` with weights and arithmetic in `precision`."""
    return Format(
        filename,
        "probabilities",
        partial(coreml.write, precision=precision),
        coreml.runner,
        coreml.spec,
        coreml.operations,
        partial(
            coreml_checks.check,
            precision=getattr(torch, precision),
            tolerance=tolerance,
            program_tolerance=PROGRAM_TOLERANCE,
        ),
    )


# Largest relative errors of logits. Float32 differs by the order of its sums, and folding adds
# as much; float16 keeps 11 bits a value, through some forty layers.
FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 1e-3, 5e-2
PROGRAM_TOLERANCE = 1e-4  # nothing but the order of the sums differs

FORMATS = {
    "torchscript": _tensors("model.torchscript.pt", torchscript, FLOAT32_TOLERANCE),
    "torch_export": _tensors("model.pt2", torch_export, FLOAT32_TOLERANCE),
    "onnx": _tensors("model.onnx", onnx, FLOAT32_TOLERANCE),
    "coreml": _coreml("model.mlpackage", "float16", FLOAT16_TOLERANCE),
    "coreml_fp32": _coreml("model.fp32.mlpackage", "float32", FLOAT32_TOLERANCE),
}
DEFAULT_FORMATS = ("torchscript", "coreml")


def check_formats(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple without repeats.

    Raises:
        ValueError: there is none, or one is unknown.
    """
    if isinstance(names, str):
        raise ValueError(f"`formats` (={names!r}) must be a list of names, e.g. [{names!r}]")
    chosen = tuple(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in FORMATS]
    if unknown or not chosen:
        raise ValueError(f"unknown formats {unknown}: choose one or more of {sorted(FORMATS)}")
    return chosen
