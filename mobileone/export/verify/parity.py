"""How far an exported file's outputs are from those of the trained network."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec

__all__ = [
    "NotVerifiedError",
    "Parity",
    "Reference",
    "Runner",
    "as_tuple",
    "compare",
    "compare_outputs",
    "fixed_images",
    "measure",
    "recovered_logits",
]

# An image whose two largest probabilities are at least this far apart has a clear class
CLEAR_MARGIN = 0.1
_ROUNDING_IMAGES = 8  # on which the rounding of float32 is measured

# A file as a function: 8-bit images (N, C, H, W) -> the output, or several in the network's order
Runner = Callable[[Tensor], Any]


class NotVerifiedError(RuntimeError):
    """The format cannot be run on this machine, so nothing is known about its outputs."""


@dataclass(frozen=True)
class Reference:
    """What a file is compared with.

    Attributes:
        model: the fused network that was written, float32, eval mode, on the CPU.
        outputs: by name, (N, ...), of the trained network itself, branches and all.
        images: 8-bit images (N, C, H, W).
        known: what was measured already, of which copies with fewer images take the same.
    """

    model: nn.Module
    outputs: Mapping[str, Tensor]
    images: Tensor
    known: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def logits(self) -> Tensor:
        """A classifier's output, (N, classes)."""
        return self.outputs["logits"]

    def at_most(self, count: int | None) -> "Reference":
        """The same with fewer images, taken evenly from all of them; None keeps all."""
        step = 1 if count is None else math.ceil(len(self.images) / count)
        outputs = {name: output[::step] for name, output in self.outputs.items()}
        return replace(self, outputs=outputs, images=self.images[::step])

    @torch.no_grad()
    def fused_outputs(self, spec: ExportSpec) -> dict[str, Tensor]:
        """The same of the fused network."""
        return self._outputs_of(self.model, normalize(self.images, spec))

    @torch.no_grad()
    def rounding(self, spec: ExportSpec) -> float:
        """How far float32 itself takes the fused network from float64, as `max_relative_error`.

        Logits of a network that has hardly been trained are small differences of large numbers:
        each order of the sums gives others. 0 for a network that does not run in float64.
        """
        if "rounding" not in self.known:
            self.known["rounding"] = self._rounding(spec)
        return self.known["rounding"]

    def _rounding(self, spec: ExportSpec) -> float:
        few = self.at_most(_ROUNDING_IMAGES)
        found = tuple(few.fused_outputs(spec).values())
        try:
            exact = few._outputs_of(
                copy.deepcopy(self.model).double(), normalize(few.images, spec).double()
            )
        except RuntimeError:
            return 0.0
        return compare_outputs(exact, found).max_relative_error or 0.0

    def _outputs_of(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.outputs, as_tuple(model(images)), strict=True))


@dataclass(frozen=True)
class Parity:
    """Outcome of a comparison.

    Attributes:
        status: `measured`; `not verified` (never run: no statement about the file); `not finite`
            (the outputs have infinities or NaN, which no error can measure).
        reason: why it was not measured.
        kind: what was compared: `logits`, `probabilities`, or the names of several outputs.
        images: number of images compared.
        max_relative_error: largest over the images of `max|file - model| / max|model|`; of maps and
            boxes, `max|model|` is that of all images.
        top1_agreement: share of the images given the same class, 0..1; of classifiers only.
        tolerance: largest `max_relative_error` that is accepted.
        min_agreement: least `top1_agreement` that is accepted.
        clear_images: how many have a clear class: the network's two largest probabilities are at
            least 0.1 apart.
        clear_changed: how many of these the file gives another class.
        max_clear_changed: largest `clear_changed` that is accepted.
    """

    status: str
    reason: str | None = None
    kind: str | None = None
    images: int | None = None
    max_relative_error: float | None = None
    top1_agreement: float | None = None
    tolerance: float | None = None
    min_agreement: float | None = None
    clear_images: int | None = None
    clear_changed: int | None = None
    max_clear_changed: int | None = None

    @property
    def accepted(self) -> bool:
        """False if the outputs are not finite, err too much, or agree too seldom."""
        return self.problem() is None

    def problem(self) -> str | None:
        """The reason why it is not accepted; None if it is."""
        if self.status == "not finite":
            return self.reason
        if _above(self.min_agreement, self.top1_agreement):
            return (
                f"the network's class for {self.top1_agreement:.1%} of {self.images} images, which "
                f"is less than {self.min_agreement:.0%}"
            )
        if _above(self.max_relative_error, self.tolerance):
            return (
                f"relative error {self.max_relative_error:.2g} of the {self.kind} is above "
                f"{self.tolerance:g}"
            )
        if _above(self.clear_changed, self.max_clear_changed):
            return (
                f"another class than the network's for {self.clear_changed} of the "
                f"{self.clear_images} images whose class is clear"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields that apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and not value <= limit


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


def recovered_logits(probabilities: Tensor, logits: Tensor) -> Tensor:
    """The logits that probabilities of a file show, (N, classes): those of unlikely classes too.

    What the softmax took away is the network's own: the shift of an image's logits, and those of
    classes below 1e-30, which float32 cannot tell from 0 in every runtime.

    Args:
        probabilities: the file's, (N, classes).
        logits: the network's, (N, classes).
    """
    if probabilities.shape != logits.shape:
        return probabilities  # which `compare` names
    own, least = logits.double(), torch.tensor(1e-30, dtype=torch.float64).log()
    shift = own.logsumexp(dim=1, keepdim=True)  # (N, 1)
    found = probabilities.double().log()
    hidden = (found <= least) & (own - shift <= least)
    return torch.where(hidden, own, found.clamp_min(least) + shift)


def compare(
    reference: Tensor, candidate: Tensor, kind: str, tolerance: float | None = None
) -> Parity:
    """Compare an output of the file with the network's, (N, ...), in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"the file returned {tuple(candidate.shape)}, the model {tuple(reference.shape)}"
        )
    ranked = reference.ndim == 2
    reference, candidate = reference.double().flatten(1), candidate.double().flatten(1)
    for who, table in (("network", reference), ("file", candidate)):
        bad = int((~table.isfinite()).any(dim=1).sum())
        if bad:
            reason = f"the {who} gives {bad} of {len(table)} images {kind} that are not finite"
            return Parity("not finite", reason, kind, len(table), tolerance=tolerance)
    difference = (candidate - reference).abs().amax(dim=1)  # (N,)
    scale = reference.abs().amax(dim=1)
    if not ranked:  # an image may have no large value in its map
        scale = scale.max()
    scale = scale.clamp_min(torch.finfo(torch.float64).tiny)
    parity = Parity(
        "measured",
        kind=kind,
        images=len(reference),
        max_relative_error=float((difference / scale).max()),
        tolerance=tolerance,
    )
    if not ranked:
        return parity
    changed = reference.argmax(dim=1) != candidate.argmax(dim=1)  # (N,)
    parity = replace(parity, top1_agreement=1 - float(changed.double().mean()))
    if kind not in ("logits", "probabilities"):
        return parity
    clear = _is_clear(reference.softmax(dim=1) if kind == "logits" else reference)
    return replace(
        parity,
        clear_images=int(clear.sum()),
        clear_changed=int((clear & changed).sum()),
        max_clear_changed=0,
    )


def _is_clear(probabilities: Tensor) -> Tensor:
    """Whether the class of each image is clear, (N,)."""
    if probabilities.shape[1] < 2:
        return torch.zeros(len(probabilities), dtype=torch.bool)
    first, second = probabilities.topk(2, dim=1).values.unbind(dim=1)
    return first - second >= CLEAR_MARGIN


def compare_outputs(
    reference: Mapping[str, Tensor], found: Any, tolerance: float | None = None
) -> Parity:
    """Compare every output of a file: the result of the one that differs most.

    Args:
        reference: the network's, by name.
        found: the file's, in the same order; a tensor if there is one.
        tolerance: largest relative error that is accepted.

    Raises:
        ValueError: their number or a shape differs.
    """
    tensors = as_tuple(found)
    if len(tensors) != len(reference):
        raise ValueError(f"the file returned {len(tensors)} outputs, the network {list(reference)}")
    results = [
        compare(reference[name], tensor, name, tolerance)
        for name, tensor in zip(reference, tensors, strict=True)
    ]
    worst = max(results, key=lambda r: (r.status != "measured", r.max_relative_error or 0.0))
    return worst if worst.reason else replace(worst, kind=", ".join(reference))


def as_tuple(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a network or a file returned, one tensor or several, as a tuple."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def measure(run: Callable[[], Parity]) -> Parity:
    """Run a comparison; a file that cannot run here is not verified."""
    try:
        return run()
    except NotVerifiedError as error:
        return Parity("not verified", reason=str(error))
