"""What a data module must offer: the complete contract, checked in one place."""

from collections.abc import Mapping, Sequence
from inspect import getattr_static
from typing import Any, Protocol, cast

from lightning.pytorch import LightningDataModule

from mobileone.export.spec import ExportSpec

__all__ = ["ClassificationData", "check_data_module", "in_chans", "num_classes", "require"]


class ClassificationData(Protocol):
    """A LightningDataModule of classified images; two attributes are all that is added to it.

    They are read before the Trainer exists, so set them in ``__init__``, or write properties.
    Batches are ``(images, targets)``: float (N, C, H, W), normalized, and class indices, long (N,).

    Attributes:
        class_names: names of the classes in the order of their indices: one output of the network
            each.
        data_config: timm's description of an evaluation image: ``input_size`` (C, H, W), ``mean``
            and ``std`` (a value a channel, of images in 0..1), ``interpolation``, ``crop_pct``
            and, if it is not "center", ``crop_mode``. `timm.data.resolve_data_config` returns one.
    """

    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def data_config(self) -> Mapping[str, Any]: ...


_NEEDED = {
    "class_names": (
        "the names of the classes in the order of their indices; the network gets one output each, "
        "and the exported model carries them",
        'self.class_names = ["cat", "dog"]',
    ),
    "data_config": (
        "size and normalization of the images in timm's words; the exported model repeats them",
        'self.data_config = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), '
        '"std": (0.229, 0.224, 0.225), "interpolation": "bilinear", "crop_pct": 0.875}',
    ),
    "train_dataloader": (
        "the training images, shuffled",
        "def train_dataloader(self):  # -> DataLoader",
    ),
    "test_dataloader": (
        "the test images; `mobileone validate` scores those of the validation",
        "def test_dataloader(self):  # -> DataLoader",
    ),
    "val_dataloader": (
        "the validation images; a checkpoint and its artifact are written after each validation",
        "def val_dataloader(self):  # -> DataLoader",
    ),
    "set_curriculum": (
        "the method by which the Curriculum callback changes image size and augmentation; without "
        "it leave `curriculum.phases` empty",
        "def set_curriculum(self, phases):  # [(first epoch, pixels, strength), ...]",
    ),
}
"""Name -> what it is for, and how it is written."""

_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


def check_data_module(data: object) -> ClassificationData:
    """Return ``data`` as what it is, or say what it lacks.

    Args:
        data: a data module.

    Raises:
        ValueError: an attribute is missing or has a value that cannot be.
    """
    require(data, "class_names", "data_config", "val_dataloader")
    checked = cast(ClassificationData, data)
    config = checked.data_config
    faults = [f"lacks {key}" for key in _KEYS if key not in config]
    faults += [f"has an unknown {key}" for key in config if key not in (*_KEYS, "crop_mode")]
    if faults:
        raise ValueError(
            f"`data_config` of {type(data).__name__} {', '.join(faults)}. It needs "
            f"{', '.join(_KEYS)} and may have crop_mode, for example:\n"
            f"    {_NEEDED['data_config'][1]}"
        )
    try:
        ExportSpec("any", tuple(checked.class_names), **config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{type(data).__name__}: {error}") from error
    return checked


def num_classes(data: object) -> int:
    """How many classes a data module has.

    Raises:
        ValueError: it has no `class_names`.
    """
    require(data, "class_names")
    return len(cast(ClassificationData, data).class_names)


def in_chans(data: object) -> int:
    """How many channels the images of a data module have.

    Raises:
        ValueError: it has no `data_config`.
    """
    require(data, "data_config")
    return int(cast(ClassificationData, data).data_config["input_size"][0])


_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_NONE = (None, *(getattr(LightningDataModule, name) for name in _LOADERS))  # which only raise


def require(data: object, *names: str) -> None:
    """Make sure that a data module has these attributes.

    Raises:
        ValueError: some are missing; the message says what each is for.
    """
    # statically: a property would run the user's code, and hide an AttributeError of its own
    missing = [name for name in names if getattr_static(data, name, None) in _NONE]
    if missing:
        lines = [f"{name}: {_NEEDED[name][0]}\n    {_NEEDED[name][1]}" for name in missing]
        raise ValueError(
            f"the data module {type(data).__name__} lacks {', '.join(missing)}. Set attributes in "
            "`__init__` (they are read before `setup`), or write them as properties:\n"
            + "\n".join(lines)
        )
