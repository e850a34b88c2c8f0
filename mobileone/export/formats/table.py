"""The table of formats: a new one is a row, here or from a module of the user's own.

```python
from mobileone.export import FORMATS, Format

FORMATS["weights"] = Format("model.npz", write=write, runner=runner)
```

`--imports '[my_formats]'` imports such a module, and `--formats '[weights]'` names the row.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobileone.export.formats import coreml, onnx, torch_export, torchscript
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify import coreml as coreml_checks
from mobileone.export.verify.parity import Parity, Reference, Runner, compare_outputs, measure

__all__ = [
    "DEFAULT_FORMATS",
    "FLOAT16_TOLERANCE",
    "FORMATS",
    "Format",
    "check_formats",
    "format_of",
    "tensor_formats",
]

# Largest relative errors of logits. Float32 differs by the order of its sums, and folding adds
# as much; float16 keeps 11 bits a value, through some forty layers.
FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 1e-3, 5e-2
PROGRAM_TOLERANCE = 1e-4  # nothing but the order of the sums differs


@dataclass(frozen=True)
class Format:
    """How one kind of file is written, run and compared; the first three fields are enough.

    Attributes:
        filename: name of the file or folder inside the artifact.
        write: called with the fused float32 network in eval mode on the CPU, the spec, the path and
            the metadata; saves the file. May return a description of `input` and `output` for the
            manifest.
        runner: called with the path and the spec; loads the file as a function from 8-bit images
            (N, C, H, W) to what the network returns (`mobileone.export.normalize` makes its input).
            Loading or running raises `NotVerifiedError` where the machine cannot run it.
        tolerance: largest error of an output that is published, relative to the largest value.
        output: what the runner returns: `logits` or `probabilities`.
        spec: the file's own metadata, so that it can be run without its artifact folder.
        operations: how often each operation is in the file, by the format's own names. If given,
            a file with other convolutions, norms or additions than the network is not published.
        check: the comparisons by name, one of them `parity`, in place of running the file and
            comparing its outputs.
    """

    filename: str
    write: Callable[[nn.Module, ExportSpec, Path, Metadata], Mapping[str, Any] | None]
    runner: Callable[[Path, ExportSpec], Runner]
    tolerance: float = FLOAT32_TOLERANCE
    output: str = "logits"
    spec: Callable[[Path], ExportSpec] | None = None
    operations: Callable[[Path], Counter[str]] | None = None
    check: Callable[[Path, ExportSpec, Reference], dict[str, Parity]] | None = None

    def compare(self, path: Path, spec: ExportSpec, reference: Reference) -> dict[str, Parity]:
        """Compare a file with the network, by name of the comparison."""
        if self.check is not None:
            return self.check(path, spec, reference)
        expected = reference.outputs
        if self.output == "probabilities":
            expected = {name: value.softmax(dim=1) for name, value in expected.items()}
        return {
            "parity": measure(
                lambda: compare_outputs(
                    expected, self.runner(path, spec)(reference.images), self.tolerance
                )
            )
        }

    def count_operations(self, path: Path) -> Counter[str]:
        """The operations in a file; none where the format does not count them."""
        return self.operations(path) if self.operations else Counter()


def tensor_formats(outputs: Sequence[str] | None = None) -> dict[str, Format]:
    """The rows of files that take and return tensors, and run everywhere.

    Args:
        outputs: names of what the network returns; None for a classifier's logits.
    """
    files = {
        "torchscript": ("model.torchscript.pt", torchscript),
        "torch_export": ("model.pt2", torch_export),
        "onnx": ("model.onnx", onnx),
    }
    return {
        name: Format(
            filename,
            partial(module.write, outputs=outputs),
            module.runner,
            spec=module.spec,
            operations=module.operations,
        )
        for name, (filename, module) in files.items()
    }


def _coreml(filename: str, precision: coreml.Precision, tolerance: float) -> Format:
    """A row for an `.mlpackage` with weights and arithmetic in `precision`."""
    return Format(
        filename,
        partial(coreml.write, precision=precision),
        coreml.runner,
        tolerance,
        "probabilities",
        coreml.spec,
        coreml.operations,
        partial(
            coreml_checks.check,
            precision=getattr(torch, precision),
            tolerance=tolerance,
            program_tolerance=PROGRAM_TOLERANCE,
        ),
    )


FORMATS = {
    **tensor_formats(),
    "coreml": _coreml("model.mlpackage", "float16", FLOAT16_TOLERANCE),
    "coreml_fp32": _coreml("model.fp32.mlpackage", "float32", FLOAT32_TOLERANCE),
}
DEFAULT_FORMATS = ("torchscript", "coreml")


def check_formats(
    names: Iterable[str], table: Mapping[str, Format] | None = None
) -> tuple[str, ...]:
    """The names as a tuple without repeats.

    Args:
        names: of formats.
        table: where they are rows; None for `FORMATS`.

    Raises:
        ValueError: there is none, or one is unknown.
    """
    if isinstance(names, str):
        raise ValueError(f"`formats` (={names!r}) must be a list of names, e.g. [{names!r}]")
    known = FORMATS if table is None else table
    chosen = tuple(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise ValueError(
            f"unknown formats {unknown}: choose one or more of {sorted(known)}, or import the "
            "module that registers yours: --imports '[my_formats]'"
        )
    return chosen


def format_of(path: Path) -> str | None:
    """The format of a file by the end of its name, the first of `FORMATS` that ends so, or None."""
    return next((n for n, row in FORMATS.items() if Path(row.filename).suffix == path.suffix), None)
