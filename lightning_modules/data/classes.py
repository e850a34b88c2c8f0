"""Class names, their indices, and checks that the splits agree on them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

__all__ = [
    "canonical_order",
    "check_all_classes",
    "check_class_folders",
    "check_known_classes",
    "class_to_index",
    "read_class_file",
]


def read_class_file(path: str) -> dict[str, int]:
    """Name -> index from a text file with one class a line, in the order of the indices.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or a name that occurs twice.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"classes={path!r} is not a file. Give a text file with one class name a line."
        )
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or repeated:
        wrong = f"repeats {_listing(repeated)}" if repeated else "is empty"
        raise ValueError(f"classes={path!r} {wrong}. It needs one distinct class name a line.")
    return {name: index for index, name in enumerate(names)}


def class_to_index(dataset: Any) -> dict[str, int]:
    """Name -> index as timm's reader or torchvision's dataset has it.

    Raises:
        ValueError: the dataset does not say how its classes are called.
    """
    holder = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):  # the second in timm's tar reader
        if mapping := getattr(holder, attribute, None):
            return {str(name): int(index) for name, index in mapping.items()}
    raise ValueError(
        f"{type(holder).__name__} does not name its classes. Set --data.classes to a text file "
        "with one class name a line, in the order of the indices."
    )


def check_class_folders(dataset: Any, split: str) -> None:
    """For image folders: every folder of the split is a class with at least one image.

    Raises:
        ValueError: an empty class folder, images outside any class folder, or a hidden folder
            with images, which would silently become a class.
    """
    reader = getattr(dataset, "reader", None)
    if not isinstance(dataset, ImageDataset) or not isinstance(reader, ReaderImageFolder):
        return
    root = Path(reader.root)
    inside = {name.replace("\\", "/").partition("/")[0] for name in reader.filenames()}
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    hidden = sorted(name for name in folders & inside if name.startswith("."))
    if hidden:
        raise ValueError(
            f"{split}: hidden folders in {str(root)!r} hold images and would become classes: "
            f"{_listing(hidden)}. Remove them."
        )
    loose = sorted(inside - folders)
    if loose:
        raise ValueError(
            f"{split}: {len(loose)} images lie directly in {str(root)!r}, for example "
            f"{loose[0]}. Every image must lie in a folder named after its class."
        )
    empty = sorted(name for name in folders - inside if not name.startswith("."))
    if empty:
        raise ValueError(
            f"{split}: no images in {_listing(empty)} (in {str(root)!r}). Add images or remove "
            "the empty folders."
        )


def check_known_classes(expected: Iterable[str], found: Iterable[str], split: str) -> None:
    """Raise ValueError if ``split`` has a class that has no index."""
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise ValueError(
            f"{split} has classes that are not among the {len(set(expected))} known ones (those of "
            f"training, or of the --data.classes file): {_listing(unknown)}. Add training images "
            "of them, remove them, or correct the spelling."
        )


def check_all_classes(expected: Iterable[str], found: Iterable[str], split: str) -> None:
    """Raise ValueError if ``split`` lacks a class: it would silently not count."""
    absent = sorted(set(expected) - set(found))
    if absent:
        raise ValueError(
            f"{split} has no images of {_listing(absent)}, which training (or the --data.classes "
            f"file) has. Add a folder with images of them to {split}, or remove them there."
        )


def canonical_order(names: Iterable[str]) -> dict[str, int]:
    """Name -> index as timm sorts folders (numbers by value), but with ties ("1", "01") decided."""
    ordered = sorted(names, key=lambda name: (natural_key(name), name))
    return {name: index for index, name in enumerate(ordered)}


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
