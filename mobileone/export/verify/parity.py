"""How far an exported file's answers are from those of the trained model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.spec import ExportSpec

__all__ = [
    "NotVerifiedError",
    "Parity",
    "Reference",
    "Runner",
    "check_logits",
    "compare",
    "fixed_images",
    "measure",
]

# A file as a function: 8-bit images (N, C, H, W) -> logits or probabilities (N, classes)
Runner = Callable[[Tensor], Tensor]


class NotVerifiedError(RuntimeError):
    """The format cannot be run on this machine, so nothing is known about its answers."""


@dataclass(frozen=True)
class Reference:
    """What a file is compared with.

    Attributes:
        model: the fused network that was written, float32, eval mode, on the CPU.
        logits: (N, classes), of the trained network itself, branches and all.
        images: 8-bit images (N, C, H, W).
    """

    model: nn.Module
    logits: Tensor
    images: Tensor


@dataclass(frozen=True)
class Parity:
    """Outcome of a comparison.

    Attributes:
        status: `measured`; `not verified` (never run: says nothing about the file); `not finite`
            (the answers have infinities or NaN, which no error can measure).
        reason: why it was not measured.
        kind: what was compared: `logits` or `probabilities`.
        images: number of images compared.
        max_relative_error: largest over the images of `max|file - model| / max|model|`.
        top1_agreement: share of the images given the same class, 0..1.
        tolerance: largest `max_relative_error` that is accepted.
    """

    status: str
    reason: str | None = None
    kind: str | None = None
    images: int | None = None
    max_relative_error: float | None = None
    top1_agreement: float | None = None
    tolerance: float | None = None

    @property
    def accepted(self) -> bool:
        """False if the answers are not finite, or their error is above the tolerance."""
        if self.status == "not finite":
            return False
        if self.max_relative_error is None or self.tolerance is None:
            return True
        return self.max_relative_error <= self.tolerance

    def problem(self) -> str | None:
        """Why it is not accepted, in words; None if it is."""
        if self.accepted:
            return None
        if self.max_relative_error is None:
            return self.reason
        return (
            f"relative error {self.max_relative_error:.2g} of the {self.kind} is above "
            f"{self.tolerance:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def fixed_images(spec: ExportSpec, count: int = 8) -> Tensor:
    """The same 8-bit images (count, C, H, W) on every call: coarse random patches plus noise.

    Patches give the model structure at the scale of its filters, noise gives it every value.
    """
    generator = torch.Generator().manual_seed(0)
    channels, height, width = spec.input_size
    coarse = torch.rand(count, channels, 8, 8, generator=generator)
    patches = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    noise = torch.rand(count, channels, height, width, generator=generator)
    return ((0.8 * patches + 0.2 * noise) * 255).round().to(torch.uint8)


def compare(
    reference: Tensor, candidate: Tensor, kind: str, tolerance: float | None = None
) -> Parity:
    """Compare two (N, classes) tables of logits or probabilities, in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"the file returned {tuple(candidate.shape)}, the model {tuple(reference.shape)}"
        )
    reference, candidate = reference.double(), candidate.double()
    for who, table in (("network", reference), ("file", candidate)):
        bad = int((~table.isfinite()).any(dim=1).sum())
        if bad:
            reason = f"the {who} gives {bad} of {len(table)} images {kind} that are not finite"
            return Parity("not finite", reason, kind, len(table), tolerance=tolerance)
    difference = (candidate - reference).abs().amax(dim=1)  # (N,)
    scale = reference.abs().amax(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    agree = (reference.argmax(dim=1) == candidate.argmax(dim=1)).double().mean()
    return Parity(
        "measured",
        kind=kind,
        images=len(reference),
        max_relative_error=float((difference / scale).max()),
        top1_agreement=float(agree),
        tolerance=tolerance,
    )


def measure(run: Callable[[], Parity]) -> Parity:
    """Run a comparison; a file that cannot run here is not verified."""
    try:
        return run()
    except NotVerifiedError as error:
        return Parity("not verified", reason=str(error))


def check_logits(
    path: Path,
    spec: ExportSpec,
    reference: Reference,
    *,
    runner: Callable[[Path, ExportSpec], Runner],
    tolerance: float,
) -> dict[str, Parity]:
    """The check of a format whose file returns logits and runs everywhere."""

    def run() -> Parity:
        logits = runner(path, spec)(reference.images)
        return compare(reference.logits, logits, "logits", tolerance)

    return {"parity": measure(run)}
