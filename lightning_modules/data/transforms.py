"""timm's training and evaluation transforms, resolved from the model's configuration."""

import inspect
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import (
    LEVEL_TO_ARG,
    AugmentOp,
    AugMixAugment,
    AutoAugment,
    RandAugment,
)
from timm.models import PretrainedCfg
from torch import Tensor

import mobileone  # noqa: F401  registers the family with timm
from lightning_modules.checks import check_model_name
from lightning_modules.data.image_io import color_mode
from mobileone.io.suggest import did_you_mean

__all__ = [
    "PhasedTransform",
    "Transform",
    "check_augmentation_kwargs",
    "eval_transform",
    "resolve_config",
    "scale_strength",
    "train_transform",
]

Transform = Callable[[Image.Image], Tensor]

_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}


def resolve_config(
    model: str,
    input_size: int | tuple[int, int, int] | None = None,
    in_chans: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """timm's data configuration of ``model``, with the overrides that are not None.

    Args:
        model: a name that timm knows, with or without a pretrained tag.
        input_size: a side in pixels, or (channels, height, width).
        in_chans: channels; None for those of ``input_size``, else the model's.
        overrides: mean, std, interpolation, crop_pct, crop_mode.

    Returns:
        The keys input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode.

    Raises:
        ValueError: unknown model, or sizes and numbers of channels that cannot be.
    """
    check_model_name(model)
    # a network of the user's own may have none: timm's default values
    cfg = (timm.get_pretrained_cfg(model) or PretrainedCfg()).to_dict()
    if isinstance(input_size, int):
        input_size = (in_chans or cfg["input_size"][0], input_size, input_size)
    if in_chans is not None and input_size is None:
        input_size = (in_chans, *cfg["input_size"][1:])
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise ValueError(
            f"input_size={input_size} must be one side in pixels or (channels, height, width), "
            "all of them positive, for example 224 or [3, 224, 224]."
        )
    if in_chans is not None and input_size is not None and input_size[0] != in_chans:
        raise ValueError(
            f"in_chans={in_chans} and input_size={input_size} give two numbers of channels: "
            f"leave out in_chans, or set input_size to one side in pixels, such as {input_size[1]}."
        )
    channels = (input_size or cfg["input_size"])[0]
    color_mode(channels)
    for name in ("mean", "std"):
        overrides[name] = _per_channel(name, overrides.get(name), cfg[name], channels)
    crop_pct = overrides.get("crop_pct")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} must be above 0 and at most 1, for example 0.875.")
    for name, valid in _CHOICES.items():
        if overrides.get(name) not in (None, *valid):
            raise ValueError(f"{name}={overrides[name]!r} must be one of {', '.join(valid)}.")
    return resolve_data_config({"input_size": input_size, **overrides}, pretrained_cfg=cfg)


def eval_transform(config: dict[str, Any], normalize: bool = True) -> Transform:
    """Resize, center crop and normalize: PIL image -> float tensor (C, H, W); else 8-bit pixels."""
    return create_transform(**config, is_training=False, normalize=normalize)


def train_transform(config: dict[str, Any], **augmentation: Any) -> Transform:
    """Random resized crop, flips and what ``augmentation`` asks for: PIL image -> (C, H, W).

    Args:
        config: what `resolve_config` returned.
        augmentation: auto_augment, color_jitter, hflip, vflip, scale, ratio, re_prob as
            `timm.data.create_transform` takes them, and any of its others.

    Raises:
        ValueError: a value that timm does not take, or an ``auto_augment`` for RGBA images.
    """
    policy = augmentation.get("auto_augment")
    if policy and config["input_size"][0] == 4:
        raise ValueError(
            f"auto_augment={policy!r} cannot be used with 4 input channels: Pillow's color "
            "operations do not support RGBA. Set auto_augment to null, or use 3 channels."
        )
    if policy:
        _check_parts(policy)
    try:
        return create_transform(**config, is_training=True, **augmentation)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        given = {key: value for key, value in augmentation.items() if value is not None}
        raise ValueError(
            f"timm cannot build the training transform ({error!r}) with {given}. An auto_augment "
            "is for example 'original-mstd0.5', 'v0', '3a', 'rand-m9-mstd0.5', 'augmix-m3', or "
            "null for none."
        ) from error


# what stays timm's default: other results than a tensor (C, H, W), or for other libraries
_FIXED = {
    *("is_training", "normalize", "separate", "use_prefetcher", "tf_preprocessing"),
    *("crop_border_pixels", "re_num_splits", "naflex", "patch_size", "max_seq_len"),
}
_DEPENDENT = {"re_mode": "re_prob", "re_count": "re_prob", "color_jitter_prob": "color_jitter"}


def check_augmentation_kwargs(kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check the names of further arguments of `timm.data.create_transform`.

    Args:
        kwargs: the further arguments.
        options: name -> value of those that have an option of their own.

    Raises:
        ValueError: a name that timm does not know, that has an option of its own, or that does
            nothing with these options.
    """
    own = {*options, "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    valid = [
        name
        for name in inspect.signature(create_transform).parameters
        if name not in {*own, *_FIXED} and not name.startswith("patchify")
    ]
    for name in kwargs:
        if name in own:
            raise ValueError(f"augmentation_kwargs has {name!r}: set --data.{name} in its place.")
        if name not in valid:
            raise ValueError(
                f"augmentation_kwargs has {name!r}, which timm.data.create_transform does not take "
                f"here{did_you_mean(name, valid) or '.'} Valid names: {', '.join(valid)}."
            )
        needed = _DEPENDENT.get(name)
        if needed and not options[needed]:
            raise ValueError(
                f"augmentation_kwargs has {name!r}, which does nothing without --data.{needed}: "
                "set that, too."
            )


def _check_parts(policy: str) -> None:
    """Refuse the parts of a policy that timm would skip: those without a number."""
    name, *parts = policy.split("-")
    for part in parts:
        is_set = name == "rand" and part.startswith("t")  # of operations, by name
        if not is_set and not re.search(r"\d", part):
            raise ValueError(
                f"auto_augment={policy!r} has the part {part!r}, which has no number: write it as "
                "in 'rand-m9-mstd0.5', 'original-mstd0.5' or 'augmix-m3'."
            )


def _per_channel(
    name: str, given: tuple[float, ...] | None, default: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """``given``, else the model's values; a gray image takes the mean of the three colors."""
    if given is None and channels == 1:
        return (sum(default) / len(default),)
    values = tuple(default if given is None else given)
    if len(values) not in (1, channels):
        raise ValueError(
            f"{name}={list(values)} has {len(values)} values for {channels} input channels. "
            f"Give {name} as one value or {channels} values, in the range 0 to 1."
        )
    return values * channels if len(values) == 1 else values


# Magnitudes at which an operation does least, where that is not 0: timm's plain enhancements are
# the identity in the middle of their range, and these solarize and posterize less the higher.
_WEAKEST = {
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 5.0),
    **dict.fromkeys(("Solarize", "Posterize", "PosterizeOriginal"), 10.0),
}


class PhasedTransform:
    """The transform of each epoch.

    Args:
        phases: First epoch and transform of each phase, by epoch; the first starts at 0.
    """

    def __init__(self, phases: Sequence[tuple[int, Transform]]) -> None:
        self.starts = [start for start, _ in phases]
        self.transforms = [transform for _, transform in phases]

    def at(self, epoch: int) -> Transform:
        """The transform of an epoch, counted from 0."""
        return self.transforms[bisect_right(self.starts, epoch) - 1]


def scale_strength(transform: Transform, strength: float) -> Transform:
    """Weaken the AutoAugment or RandAugment inside a timm transform.

    Each operation's magnitude moves towards the one at which that operation does least; operations
    without a magnitude (equalize, invert …) are applied less often.

    Args:
        transform: What `timm.data.create_transform` built.
        strength: From 0 (weakest) to 1 (as built).

    Returns:
        A weakened copy.
    """
    weakened = deepcopy(transform)
    for op in _operations(weakened):
        if LEVEL_TO_ARG[op.name] is None:
            op.prob *= strength
        else:
            weakest = _WEAKEST.get(op.name, 0.0)
            op.magnitude = weakest + strength * (op.magnitude - weakest)
    return weakened


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Every operation of the policies inside a `Compose` of timm's."""
    for part in transform.transforms:
        if isinstance(part, AutoAugment):
            yield from chain.from_iterable(part.policy)
        elif isinstance(part, RandAugment | AugMixAugment):
            yield from part.ops
