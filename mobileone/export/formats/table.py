"""The table of formats: a new one is a row, here or from a module of the user's own.

```python
from mobileone.export import FORMATS, Format

FORMATS["weights"] = Format("model.npz", write=write, runner=runner)
```

`--imports '[my_formats]'` imports such a module, and `--formats '[weights]'` names the row.
"""

import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobileone.export.formats import (
    coreai,
    coreml,
    executorch,
    int8,
    litert,
    onnx,
    torch_export,
    torchscript,
)
from mobileone.export.spec import ExportSpec, Metadata, NoSpecError
from mobileone.export.verify import coreml as coreml_checks
from mobileone.export.verify import integers
from mobileone.export.verify.parity import (
    NotVerifiedError,
    Parity,
    Reference,
    Runner,
    as_tuple,
    compare_outputs,
    recovered_logits,
)
from mobileone.io.optional_import import require
from mobileone.quantization.rounding import FEW_BITS, Scheme

__all__ = [
    "DEFAULT_FORMATS",
    "DEFAULT_INTEGER_FORMATS",
    "FLOAT16_TOLERANCE",
    "FORMATS",
    "Format",
    "check_formats",
    "check_integers",
    "check_packages",
    "format_of",
    "tensor_formats",
]

# Largest relative errors of logits. Float32 differs by the order of its sums, and folding adds
# as much; float16 keeps 11 bits a value, through some forty layers. The worst of 64 images was
# 0.02 to 0.18 away in short trainings of S0 in which no clear class changed, which is the rule.
FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 1e-3, 0.25
PROGRAM_TOLERANCE = 1e-4  # nothing but the order of the sums differs
CLASSIFIER_TOLERANCE = 1e-5  # the same, of a classifier in float32: 1e-6 was measured
_ORDERS_OF_SUMS = (
    4  # times the network's own rounding; a converter's sums have an order of their own
)
_FLOAT16_ADVICE = (
    "float16 keeps 11 bits and ends at 65504, which the statistics of few training steps exceed: "
    "train longer, or choose float32, --formats '[torchscript,coreml_fp32]' (of fit: "
    "--checkpoint.formats)"
)


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
        integers: the file is of integers: it is written from a quantized network, and the others
            from networks of floats.
        optional_pixels: the file takes pixels and returns probabilities where its spec has
            `pixels`, and returns `output` otherwise.
        program_tolerance: the same as `tolerance`, against the fused network, from which nothing
            but the order of the sums differs; None leaves that comparison out. Four times the
            network's own rounding is accepted where that is more.
        needs: the packages to write it, as `pip` takes them.
        needs_for_4_bits: those that weights of 4 bits need besides.
        most_images: on how many images it is compared at most, where running it here is slow.
        advice: what helps where a file errs too much.
    """

    filename: str
    write: Callable[[nn.Module, ExportSpec, Path, Metadata], Mapping[str, Any] | None]
    runner: Callable[[Path, ExportSpec], Runner]
    tolerance: float = FLOAT32_TOLERANCE
    output: str = "logits"
    spec: Callable[[Path], ExportSpec] | None = None
    operations: Callable[[Path], Counter[str]] | None = None
    check: Callable[[Path, ExportSpec, Reference], dict[str, Parity]] | None = None
    integers: bool = False
    optional_pixels: bool = False
    program_tolerance: float | None = None
    needs: tuple[str, ...] = ()
    needs_for_4_bits: tuple[str, ...] = ()
    most_images: int | None = None
    advice: str = ""

    def returns(self, spec: ExportSpec) -> str:
        """What the runner returns for a file with this spec: `logits` or `probabilities`."""
        return "probabilities" if self.optional_pixels and spec.pixels else self.output

    def contradictions(self, path: Path, spec: ExportSpec) -> list[str]:
        """What the file itself says otherwise than `spec`; nothing where it says nothing.

        Raises:
            ValueError: what it says cannot be read.
        """
        try:
            own = spec if self.spec is None else self.spec(path)
        except NoSpecError:
            return []
        return [
            f"`{field.name}` {said}, and {path.name} itself {found}"
            for field in fields(spec)
            if field.name != "pixels"  # which is the format's
            for said, found in _differences(getattr(spec, field.name), getattr(own, field.name))
        ]

    def compare(self, path: Path, spec: ExportSpec, reference: Reference) -> dict[str, Parity]:
        """Compare a file with the network, by name of the comparison."""
        reference = reference.at_most(self.most_images)
        if self.check is not None:
            return self.check(path, spec, reference)
        try:
            found = as_tuple(self.runner(path, spec)(reference.images))
        except NotVerifiedError as error:
            return {"parity": Parity("not verified", reason=str(error))}
        checks = {"parity": (reference.outputs, self.tolerance)}
        if self.program_tolerance is not None:
            limit = max(self.program_tolerance, _ORDERS_OF_SUMS * reference.rounding(spec))
            checks["program_parity"] = reference.fused_outputs(spec), limit
        hidden = self.returns(spec) == "probabilities"
        return {
            name: compare_outputs(
                own, (recovered_logits(found[0], own["logits"]),) if hidden else found, limit
            )
            for name, (own, limit) in checks.items()
        }

    def count_operations(self, path: Path) -> Counter[str]:
        """The operations in a file; none where the format does not count them."""
        return self.operations(path) if self.operations else Counter()


def _differences(said: Any, found: Any) -> list[tuple[str, str]]:
    """The first difference of two values, in few words: there may be thousands of class names."""
    if isinstance(said, tuple) and len(said) == len(found):
        return [(repr(a), repr(b)) for a, b in zip(said, found, strict=True) if a != b][:1]
    return [(reprlib.repr(said), reprlib.repr(found))] if said != found else []


def tensor_formats(outputs: Sequence[str] | None = None) -> dict[str, Format]:
    """The rows of files that take and return tensors, and run everywhere.

    Args:
        outputs: names of what the network returns; None for a classifier's logits.
    """
    files = {
        "torchscript": ("model.torchscript.pt", torchscript, ()),
        "torch_export": ("model.pt2", torch_export, ()),
        "onnx": ("model.onnx", onnx, onnx.NEEDS),
    }
    devices = {
        "executorch": ("model.pte", executorch, executorch.NEEDS),
        "litert": ("model.tflite", litert, litert.NEEDS),
        "coreai": ("model.aimodel", coreai, coreai.NEEDS),
    }
    # of maps and boxes the worst of thousands of values counts
    tolerance = CLASSIFIER_TOLERANCE if outputs is None else PROGRAM_TOLERANCE
    rows = {}
    for name, (filename, module, needs) in {**files, **devices}.items():
        rows[name] = Format(
            filename,
            partial(module.write, outputs=outputs),
            module.runner,
            output="probabilities" if name in devices and outputs is None else "logits",
            optional_pixels=name in files and outputs is None,
            program_tolerance=tolerance if name in devices else None,
            needs=needs,
            spec=module.spec,
            operations=module.operations,
            # its interpreter takes 0.9 s for an image of 224 px
            most_images=8 if name == "coreai" and sys.platform != "darwin" else None,
        )
    return rows


def _coreml(
    filename: str, precision: coreml.Precision, tolerance: float, advice: str = ""
) -> Format:
    """A row for an `.mlpackage` with weights and arithmetic in `precision`."""
    return Format(
        filename,
        partial(coreml.write, precision=precision),
        coreml.runner,
        tolerance,
        "probabilities",
        spec=coreml.spec,
        operations=coreml.operations,
        check=partial(
            coreml_checks.check,
            precision=getattr(torch, precision),
            tolerance=tolerance,
            program_tolerance=PROGRAM_TOLERANCE,
        ),
        advice=advice,
    )


def _int8(name: str, row: Format) -> Format:
    """A row for the integer file that is run and read as the file of a float row."""
    road = int8.ROADS[name]
    return Format(
        row.filename.replace("model.", "model.int8."),
        road.write,
        row.runner,
        output=row.output,
        optional_pixels=row.optional_pixels,
        needs=row.needs,
        needs_for_4_bits=road.needs_for_4_bits,
        spec=row.spec,
        operations=lambda path: road.read(path).operations,
        check=partial(integers.check, runner=row.runner, returns=row.returns, read=road.read),
        integers=True,
    )


FORMATS = {
    **tensor_formats(),
    "coreml": _coreml("model.mlpackage", "float16", FLOAT16_TOLERANCE, _FLOAT16_ADVICE),
    "coreml_fp32": _coreml("model.fp32.mlpackage", "float32", FLOAT32_TOLERANCE),
}
FORMATS |= {f"{name}_int8": _int8(name, FORMATS[name]) for name in int8.ROADS}
DEFAULT_FORMATS = ("torchscript", "coreml")
DEFAULT_INTEGER_FORMATS = ("onnx_int8", "coreml_int8")


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
    if "coreai_int8" in unknown:
        raise ValueError(
            "there is no format `coreai_int8` yet: coreai-torch 0.4.3 refuses the operators "
            "quantized_decomposed; take `coreml_int8`"
        )
    if unknown or not chosen:
        raise ValueError(
            f"unknown formats {unknown}: choose one or more of {sorted(known)}, or import the "
            "module that registers yours: --imports '[my_formats]'"
        )
    return chosen


def check_packages(
    names: Iterable[str],
    table: Mapping[str, Format] | None = None,
    scheme: Scheme | None = None,
) -> None:
    """Make sure, without importing them, that the packages to write these formats are here.

    Args:
        names: of formats, known.
        table: where they are rows; None for `FORMATS`.
        scheme: how the network is quantized; None: it is not.

    Raises:
        ImportError: one is missing, or of a version that does not fit; names all of them and the
            pip command.
    """
    known = FORMATS if table is None else table
    few = scheme in FEW_BITS
    require({n: known[n].needs + few * known[n].needs_for_4_bits for n in names}, "formats")


def check_integers(
    names: Iterable[str], quantized: bool, table: Mapping[str, Format] | None = None
) -> None:
    """Make sure that the formats can hold a network.

    Args:
        names: of formats, known.
        quantized: whether it is a network of integers.
        table: where they are rows; None for `FORMATS`.

    Raises:
        ValueError: one is for the other kind of networks.
    """
    known = FORMATS if table is None else table
    wrong = [name for name in names if known[name].integers != quantized]
    fit = sorted(name for name, row in known.items() if row.integers == quantized)
    if not wrong:
        return
    if quantized:
        raise ValueError(
            f"the formats {wrong} hold floats, and the network is quantized: choose from {fit}"
        )
    raise ValueError(
        f"the formats {wrong} hold integers, and the network is not quantized: train it with "
        "--model.quantize int8 (configs/quantize.yaml), round it by `mobileone compress`, or "
        f"choose from {fit}"
    )


def format_of(path: Path) -> str | None:
    """The format of a file by the end of its name, the first of `FORMATS` that ends so, or None."""
    return next((n for n, row in FORMATS.items() if Path(row.filename).suffix == path.suffix), None)
