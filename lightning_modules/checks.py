"""Errors that report what is wrong with a name, a label or a class list."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, SupportsIndex

import timm
import torch
from torch import Tensor

from mobileone.io.suggest import did_you_mean

__all__ = ["check_checkpoint_classes", "check_model_name", "check_targets", "label_fault"]


def check_model_name(name: str) -> None:
    """Raise ValueError, with similar names, unless timm knows `name`; hub addresses pass."""
    if ":" in name or timm.is_model(name):
        return
    hint = did_you_mean(name, timm.list_models()) or "; timm.list_models() has all names."
    raise ValueError(
        f"unknown `model` (={name!r}){hint} If a module of yours registers it, import that module "
        "first, on the command line with --imports '[my_networks]'"
    )


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Raise ValueError unless `targets` (N,) are class indices; CUDA's own error is unclear."""
    if targets.dtype != torch.long or targets.ndim != 1:
        raise ValueError(
            f"targets must be class indices, torch.int64 of shape (N,); got {targets.dtype} of "
            f"shape {tuple(targets.shape)}"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"a label (={low if low < 0 else high}) is outside 0..{num_classes - 1}, the classes "
            f"of `num_classes` (={num_classes}): set num_classes to the number of classes in the "
            "data, and number the labels from 0"
        )


def label_fault(label: Any, num_classes: int) -> str | None:
    """What is wrong with the label of an image, or None; the caller knows the image's name."""
    if isinstance(label, SupportsIndex) and 0 <= int(label) < num_classes:
        return None
    return (
        f"has the label {label!r}, and the {num_classes} classes are numbered 0 to "
        f"{num_classes - 1}. Correct the label in the data set."
    )


def check_checkpoint_classes(trained: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError unless the data's classes are the checkpoint's, in the same order."""
    if list(trained) == list(present):
        return
    index, (was, now) = next(
        (i, pair) for i, pair in enumerate(zip_longest(trained, present)) if pair[0] != pair[1]
    )
    raise ValueError(
        f"the checkpoint was trained on other classes than the data have: class {index} is {was!r} "
        f"in the checkpoint and {now!r} in the data; use the data set it was trained on, or give "
        "the classes in its order"
    )
