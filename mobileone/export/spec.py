"""What a trained classifier expects and returns: primitives, for checkpoints and for JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["ExportSpec", "Metadata", "NoSpecError"]


class NoSpecError(ValueError):
    """A file that does not say what it expects and returns."""


@dataclass(frozen=True)
class ExportSpec:
    """Everything in addition to the weights that is needed to run a classifier on an image.

    Attributes:
        model_name: timm name of the model, for example `mobileone_s0`.
        class_names: one name a logit, in the order of the logits.
        input_size: `(channels, height, width)` in pixels at evaluation.
        mean: per-channel mean subtracted from images scaled to 0..1.
        std: per-channel standard deviation that the difference is divided by.
        interpolation: resize filter at evaluation: `nearest`, `bilinear`, `bicubic`, ...
        crop_pct: side of the crop over the side of the resized image, in (0, 1].
        crop_mode: timm's crop mode: `center`, `squash` or `border`.
        pixels: files of tensors take float32 pixel values 0..255 and return probabilities, with
            normalization and softmax inside; false: normalized images and logits.

    Raises:
        ValueError: a field is out of its range or the fields contradict each other.
    """

    model_name: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    pixels: bool = False

    def __post_init__(self) -> None:
        # Lists (JSON, YAML) and numpy or torch scalars become plain tuples of plain numbers.
        convert = {
            "model_name": str(self.model_name),
            "class_names": tuple(str(n) for n in _sequence("class_names", self.class_names)),
            "input_size": tuple(int(s) for s in _sequence("input_size", self.input_size)),
            "mean": tuple(float(m) for m in _sequence("mean", self.mean)),
            "std": tuple(float(s) for s in _sequence("std", self.std)),
            "interpolation": str(self.interpolation),
            "crop_pct": float(self.crop_pct),
            "crop_mode": str(self.crop_mode),
            "pixels": bool(self.pixels),
        }
        for name, value in convert.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not self.model_name:
            raise ValueError("`model_name` is empty: give timm's name of the model")
        if not self.class_names:
            raise ValueError("`class_names` is empty: give one name a class")
        if bad := next((n for n in self.class_names if not _is_unicode(n)), None):
            raise ValueError(
                f"the class name {bad!r} is not Unicode text, which every exported file needs: "
                "rename its folder, as `convmv -f latin1 -t utf8` does"
            )
        if len(set(self.class_names)) != len(self.class_names):
            twice = sorted({n for n in self.class_names if self.class_names.count(n) > 1})
            raise ValueError(f"`class_names` must differ from each other; repeated: {twice[:5]}")
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise ValueError(
                f"`input_size` (={self.input_size}) must be (channels, height, width), all positive"
            )
        channels = self.input_size[0]
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != channels:
                raise ValueError(
                    f"`{name}` (={value}) must have one value for each of the {channels} "
                    "channels of `input_size`"
                )
            if not all(math.isfinite(v) for v in value):
                raise ValueError(f"`{name}` (={value}) must be finite")
        if min(self.std) <= 0:
            raise ValueError(f"`std` (={self.std}) must be positive")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` (={self.crop_pct}) must be in (0, 1]")

    @property
    def num_classes(self) -> int:
        """Number of classes, the length of the logits."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers and lists: survives JSON and `torch.load(weights_only=True)`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExportSpec":
        """Rebuild a spec from `to_dict`.

        Raises:
            ValueError: a field is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted(known - {"crop_mode", "pixels"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"not an export spec: unknown fields {unknown}, missing fields {missing}; "
                f"the fields are {sorted(known)}"
            )
        return cls(**values)

    def to_json(self) -> str:
        """For the metadata of a written file, so that the file alone can be run."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ExportSpec":
        """Rebuild a spec from `to_json`; empty text is that of a file that has none.

        Raises:
            NoSpecError: it is empty.
            ValueError: it is not a spec.
        """
        if not text:
            raise NoSpecError(
                "the file does not record its classes and input: keep it in its artifact folder, "
                "next to manifest.json, or export it again"
            )
        return cls.from_dict(json.loads(text))


def _is_unicode(text: str) -> bool:
    """Whether it is text: bytes of a file's name that are not UTF-8 become surrogates."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"`{name}` (={value!r}) must be a list or a tuple")
    return value


@dataclass(frozen=True)
class Metadata:
    """Free text that travels with an artifact; Core ML shows it in Xcode.

    Attributes:
        author: who made the model.
        license: the terms of the weights, for example `MIT`.
        description: what the model does; None writes one from the model's name and classes.
        version: version of the model; None writes the training step.
    """

    author: str = "not stated"
    license: str = "not stated"
    description: str | None = None
    version: str | None = None
