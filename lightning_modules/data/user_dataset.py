"""A dataset of the user's own, made by a function that `--data.dataset my_data:make_split` names.

    def make_split(root, split):  # split is "train", "val" or "test"
        return torchvision.datasets.ImageFolder(root / split)

The function returns a map-style dataset: ``len(dataset)``; ``dataset[index] -> (image, label)``, a
Pillow image or the path of one, before any transform, and an integer; and ``dataset.classes``, the
names in the order of the labels. For "test" it may return None: then the validation split is
tested, as for folders without test/.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from lightning_modules.checks import label_fault
from lightning_modules.errors import UnreadableImageError
from mobileone.io.suggest import did_you_mean
from mobileone.io.user_modules import import_user_module

__all__ = ["UserDataset", "find_function", "is_function"]

ImageOrPath = Image.Image | str | PathLike[str]

_EXAMPLE = (
    'A function (root, split) must return, for "train", "val" and "test" (None if there are no '
    "images to test), a dataset with len(dataset), dataset[0] -> (Pillow image or path, label) and "
    "dataset.classes, the names in the order of the labels."
)


def is_function(name: str) -> bool:
    """Whether a dataset's name is that of a function, ``module:function``."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def find_function(name: str) -> Callable[[Path | None, str], Any]:
    """Import ``module:function``.

    Raises:
        ValueError: there is no such module, or nothing in it that can be called by that name.
    """
    module_name, _, function_name = name.partition(":")
    module = import_user_module(module_name, "data.dataset")
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    if function is None:
        wrong = f"does not exist{did_you_mean(function_name, vars(module)) or '.'}"
    else:
        wrong = f"is not a function, but {function!r}."
    raise ValueError(f"dataset={name!r}: in {module.__file__} {function_name} {wrong} {_EXAMPLE}")


class UserDataset(Dataset[tuple[ImageOrPath, int]]):
    """What such a function returned for a split, checked, its labels being indices of classes.

    Args:
        samples: what was returned.
        name: of the function and the split, for messages.
        class_map: class name -> index; None for the order of ``samples.classes``.

    Attributes:
        class_to_idx: class name -> index, of the classes of this split.

    Raises:
        ValueError: it is not such a dataset, or its first sample is wrong.
    """

    def __init__(self, samples: Any, name: str, class_map: dict[str, int] | None = None) -> None:
        if fault := _fault_of_dataset(samples):
            raise ValueError(f"{name} {fault}. {_EXAMPLE}")
        order = class_map or {c: i for i, c in enumerate(samples.classes)}
        self.class_to_idx = {c: order[c] for c in samples.classes}
        self._indices = [order[c] for c in samples.classes]
        self._samples = samples
        self._name = name
        if fault := _fault_of_sample(samples[0]):
            raise ValueError(f"sample 0 of {name} {fault}. {_EXAMPLE}")
        self[0]  # for its label

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[ImageOrPath, int]:
        """The image, or its path, and the index of its class.

        Raises:
            UnreadableImageError: its label is not an index of ``samples.classes``.
        """
        image, label = self._samples[index]
        if fault := label_fault(label, len(self._indices)):
            raise UnreadableImageError(f"image {self.filename(index)} {fault}")
        return image, self._indices[int(label)]

    def filename(self, index: int) -> str:
        """The number of a sample and, if it is known, its path."""
        path: Any = None
        with suppress(Exception):  # it is asked for where another error is reported
            path = self._samples[index][0]
        known = f" ({path})" if isinstance(path, str | PathLike) else ""
        return f"{index}{known} of {self._name}"


def _fault_of_dataset(samples: Any) -> str | None:
    kind = type(samples)
    for method in ("__len__", "__getitem__"):
        if not callable(getattr(kind, method, None)):
            return f"returned a {kind.__name__}, which has no {method}"
    classes = getattr(samples, "classes", None)
    if not isinstance(classes, Sequence) or not all(isinstance(c, str) for c in classes):
        return f"returned a {kind.__name__} whose `classes` is {classes!r}, not a list of names"
    if len(set(classes)) < len(classes) or not classes:
        return f"returned a {kind.__name__} whose `classes` {list(classes)!r} are empty or repeated"
    return None if len(samples) else f"returned a {kind.__name__} without images"


def _fault_of_sample(sample: Any) -> str | None:
    if not isinstance(sample, Sequence) or len(sample) != 2:
        return f"is a {type(sample).__name__}, not a pair (image, label)"
    image = sample[0]
    if isinstance(image, str | PathLike):
        return None if Path(image).is_file() else f"has the image {str(image)!r}, which is no file"
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        return f"has a {kind} as its image: leave transforms out, they are the data module's"
    return None
