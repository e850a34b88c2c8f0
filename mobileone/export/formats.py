"""The table of formats: a new one is a file beside this one and a row here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mobileone.export import coreml, torchscript
from mobileone.export.metadata import Metadata
from mobileone.export.spec import ExportSpec

__all__ = ["DEFAULT_FORMATS", "FORMATS", "Format", "check_formats"]


@dataclass(frozen=True)
class Format:
    """How one kind of file is written and run.

    Attributes:
        filename: name of the file or folder inside the artifact.
        output: `logits` or `probabilities`, what `predict` returns.
        write: saves the fused float32 CPU model; returns the description of inputs and outputs.
        predict: runs the file on 8-bit images (N, C, H, W); raises `NotVerifiedError` where the
            machine cannot run it.
    """

    filename: str
    output: str
    write: Callable[[nn.Module, ExportSpec, Path, Metadata], dict[str, Any]]
    predict: Callable[[Path, ExportSpec, Tensor], Tensor]


FORMATS = {
    "torchscript": Format("model.torchscript.pt", "logits", torchscript.write, torchscript.predict),
    "coreml": Format("model.mlpackage", "probabilities", coreml.write, coreml.predict),
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
