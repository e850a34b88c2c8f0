"""Find and open the splits of a dataset through `timm.data.create_dataset`."""

from pathlib import Path
from typing import Any

from timm.data import create_dataset

from lightning_modules.data.image_io import IMAGE_SUFFIXES
from lightning_modules.data.shards.format import has_shards
from lightning_modules.data.shards.reader import open_shards

__all__ = [
    "FOLDER_NAMES",
    "check_dataset_name",
    "find_split",
    "is_indexed",
    "missing_split",
    "open_split",
]

FOLDER_NAMES = ("", "folder", "tar")
"""Dataset names that mean folders (or .tar files) of images under `root`."""

_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_SYNONYMS = (
    ("train", "training"),
    ("val", "validation", "valid", "eval", "evaluation"),
    ("test", "testing"),
)


def check_dataset_name(name: str) -> None:
    """Raise ValueError unless timm's `create_dataset` would know what ``name`` is."""
    if name not in FOLDER_NAMES and name.partition("/")[0].lower() not in _PREFIXES:
        raise ValueError(
            f"dataset={name!r} is unknown. Use '' (folders), 'tar', 'digits', or a timm name that "
            f"starts with {', '.join(f'{p}/' for p in _PREFIXES)} such as 'torch/cifar10'."
        )


def is_indexed(name: str, root: Path | None) -> bool:
    """Whether the data set is one of `mobileone shards`, and not any other WebDataset."""
    return name.partition("/")[0].lower() == "wds" and has_shards(root)


def find_split(root: Path, split: str) -> Path | None:
    """The folder or .tar file of ``split`` under ``root``, by that name or a usual synonym."""
    synonyms = next((s for s in _SYNONYMS if split in s), ())
    for name in (split, *synonyms):
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or (path.is_file() and path.suffix == ".tar"):
                return path
    return None


_OPTION = "--data.root, or SRC of `mobileone shards`"


def missing_split(root: Path, split: str) -> FileNotFoundError:
    """The error that says what is there instead of ``split``."""
    if not root.exists():
        return FileNotFoundError(
            f"data root {str(root)!r} does not exist. Give a folder that holds train/<class>/*.png "
            f"and val/<class>/*.png (jpg, webp … too): {_OPTION}."
        )
    if not root.is_dir():
        return FileNotFoundError(
            f"data root {str(root)!r} is a file. Give the folder that holds the splits, train/ and "
            f"val/, or train.tar and val.tar: {_OPTION}."
        )
    found = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    names = next((s for s in _SYNONYMS if split in s), (split,))
    listing = ", ".join(found[:10]) + (" …" if len(found) > 10 else "") if found else "nothing"
    return FileNotFoundError(
        f"no split {split!r} in {str(root)!r}: found {listing}. The images must lie in "
        f"{names[0]}/<class>/ (also accepted: {', '.join(names[1:]) or 'no other name'}). Move "
        f"the class folders there, or give the folder above the splits: {_OPTION}."
    )


def open_split(
    name: str, root: Path | None, split: str, class_map: dict[str, int] | None, **options: Any
) -> Any:
    """timm's dataset of one split, without a transform.

    Args:
        name: as `check_dataset_name` accepts it.
        root: the split itself for folders and tars, else the root that timm's reader wants.
        split: name of the split in the reader's own words.
        class_map: class name -> index for folders, tars and streams; None to derive it.
        options: for `timm.data.create_dataset`: is_training, batch_size, seed, download,
            input_img_mode.

    Raises:
        ValueError: no images, or a name that timm's reader does not know.
        ImportError: the reader's package is not installed.
    """
    if root is not None and is_indexed(name, root):
        return open_shards(root, split, class_map)
    if root is not None and root.is_dir() and name in FOLDER_NAMES:
        options["input_key"] = ";".join(IMAGE_SUFFIXES)
    place = None if root is None else str(root)
    try:
        return create_dataset(
            name, place, split=split, search_split=False, class_map=class_map or {}, **options
        )
    except ImportError as error:
        raise ImportError(
            f"dataset={name!r} needs a package that is not installed ({error}). "
            "hfds/ and hfids/ need `datasets`, wds/ `webdataset`, tfds/ `tensorflow-datasets`."
        ) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot open split {split!r} of {name or place!r}: {error}") from error
