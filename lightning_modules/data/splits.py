"""The splits of one data set, opened when needed, with one class index for all of them."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from lightning_modules.data.dataset import UserDataset, find_function, is_function
from lightning_modules.data.image_io import IMAGE_SUFFIXES
from lightning_modules.data.shards.reader import Manifest, has_shards, open_shards

__all__ = ["FOLDER_NAMES", "DatasetSplits", "check_dataset_name", "find_split", "open_split"]


class DatasetSplits:
    """Opens the splits "train", "val" and "test" through timm and checks them.

    Args:
        name: data set in timm's words; one of `FOLDER_NAMES` for folders and tars.
        root: where it is; may be None for data sets that their reader finds itself.
        train, val, test: the data set's names of the splits; ``test=None`` means the folder test/
            if there is one, else the validation split.
        classes: file with one class a line, or None.
        options: for `timm.data.create_dataset`.
    """

    def __init__(
        self,
        name: str,
        root: Path | None,
        train: str,
        val: str,
        test: str | None,
        classes: str | None,
        **options: Any,
    ) -> None:
        self._name, self._root, self._options = name, root, options
        self._folders = name in FOLDER_NAMES
        self._shards = _are_shards(name, root)
        self._function = find_function(name) if is_function(name) else None
        if self._function and val == "validation":  # the default, for timm's data sets
            val = "val"
        self._names = {"train": train, "val": val, "test": test or "test"}
        self._test_is_named = test is not None
        self._class_file = _read_class_file(classes) if classes else None
        self._opened: dict[str, Any] = {}
        self._returned: dict[str, Any] = {}

    def download(self) -> None:
        """Have the reader fetch the data."""
        for split in ("train", "val"):
            self._open(split, None, download=True)

    @cached_property
    def class_index(self) -> dict[str, int]:
        """Class name -> index, for every split: by the `classes` file, else by training.

        Raises:
            FileNotFoundError: no root, or neither training nor validation images in it.
            ValueError: no images, or no names of classes.
        """
        if self._class_file:
            return self._class_file
        split = "train"
        if self._folders and self._path("train") is None:
            if self._path("val") is None:
                self._place("train")  # raises
            rank_zero_warn(
                f"there are no training images in {str(self._root)!r}: the indices of the classes "
                "are taken from validation, which is right if it has every class."
            )
            split = "val"
        dataset = self._open(split, None)
        _check_class_folders(dataset, split)
        names = _class_to_index(dataset)
        return _canonical_order(names) if self._folders else names

    def source(self, split: str) -> Any:
        """timm's dataset of ``split``, its targets being indices of `class_index`.

        Raises:
            FileNotFoundError: no root or no such split; the message lists what is there.
            ValueError: no images, an empty class, or other classes than `class_index` has.
        """
        if split == "test" and self.tests_validation:
            split = "val"  # with the checks of validation
        if split not in self._opened:
            if self._folders:
                self._place(split)  # a missing split before anything about classes
            self._opened[split] = self._checked(split)
        return self._opened[split]

    def _checked(self, split: str) -> Any:
        dataset = self._open(split, None)
        if not (self._folders or self._shards or self._function):
            return dataset
        _check_class_folders(dataset, split)
        names = _class_to_index(dataset)
        _check_classes(self.class_index, names, split)
        return dataset if names == self.class_index else self._open(split, self.class_index)

    @property
    def tests_validation(self) -> bool:
        """Whether the test is named like validation, or not named and not there."""
        if self._test_is_named:
            place = self._path if self._folders else self._names.get
            return place("test") == place("val")
        if self._function:
            return self._call("test") is None
        if self._shards:
            return "test" not in Manifest.load(cast(Path, self._root)).splits
        return not self._folders or self._path("test") is None

    def _path(self, split: str) -> Path | None:
        return None if self._root is None else find_split(self._root, self._names[split])

    def _place(self, split: str) -> Path:
        path = self._path(split)
        if path is None:
            assert self._root is not None
            raise _missing_split(self._root, self._names[split])
        return path

    def _call(self, split: str) -> Any:
        """What the user's function returns for a split; it is called once."""
        name = self._names[split]
        if name not in self._returned:
            assert self._function is not None
            self._returned[name] = self._function(self._root, name)
        return self._returned[name]

    def _open(self, split: str, class_map: dict[str, int] | None, download: bool = False) -> Any:
        if self._function:
            return UserDataset(
                self._call(split), f"{self._name}(root, {self._names[split]!r})", class_map
            )
        return open_split(
            self._name,
            self._place(split) if self._folders else self._root,
            self._names[split],
            class_map,
            is_training=split == "train",
            download=download,
            **self._options,
        )


FOLDER_NAMES = ("", "folder", "tar")
"""Dataset names that mean folders (or .tar files) of images under `root`."""

_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_SYNONYMS = (
    ("train", "training"),
    ("val", "validation", "valid", "eval", "evaluation"),
    ("test", "testing"),
)


def check_dataset_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a function's, or timm's `create_dataset` knows it."""
    if is_function(name) or name in FOLDER_NAMES:
        return
    if name.partition("/")[0].lower() not in _PREFIXES:
        raise ValueError(
            f"dataset={name!r} is unknown. Use '' (folders), 'tar', 'digits', a function of your "
            "own as 'my_data:make_split', or a timm name that starts with "
            f"{', '.join(f'{p}/' for p in _PREFIXES)} such as 'torch/cifar10'."
        )


def _are_shards(name: str, root: Path | None) -> bool:
    """Whether the data set is one of `mobileone shards`, and not any other WebDataset."""
    return name.partition("/")[0].lower() == "wds" and has_shards(root)


def _synonyms(split: str) -> tuple[str, ...]:
    """The usual names of a split, the most usual one first."""
    return next((names for names in _SYNONYMS if split in names), (split,))


def find_split(root: Path, split: str) -> Path | None:
    """The folder or .tar file of ``split`` under ``root``, by that name or a usual synonym."""
    for name in (split, *_synonyms(split)):
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or (path.is_file() and path.suffix == ".tar"):
                return path
    return None


_OPTION = "--data.root, or SRC of `mobileone shards`"


def _missing_split(root: Path, split: str) -> FileNotFoundError:
    """The error that lists what is there instead of ``split``."""
    if not root.is_dir():
        return FileNotFoundError(
            f"data root {str(root)!r} {'is a file' if root.exists() else 'does not exist'}. Give "
            "the folder that holds train/<class>/*.png and val/<class>/*.png (jpg, webp … too), "
            f"or train.tar and val.tar: {_OPTION}."
        )
    found = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    names = _synonyms(split)
    listing = ", ".join(found[:10]) + (" …" if len(found) > 10 else "") if found else "nothing"
    return FileNotFoundError(
        f"no split {split!r} in {str(root)!r}: found {listing}. The images must be in "
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
    if root is not None and _are_shards(name, root):
        splits = Manifest.load(root).splits
        name = next((name for name in (split, *_synonyms(split)) if name in splits), split)
        return open_shards(root, name, class_map)
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


def _read_class_file(path: str) -> dict[str, int]:
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


def _class_to_index(dataset: Any) -> dict[str, int]:
    """Name -> index as timm's reader or torchvision's dataset has it.

    Raises:
        ValueError: the dataset does not name its classes.
    """
    holder = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):  # the second in timm's tar reader
        if mapping := getattr(holder, attribute, None):
            return {str(name): int(index) for name, index in mapping.items()}
    raise ValueError(
        f"{type(holder).__name__} does not name its classes. Set --data.classes to a text file "
        "with one class name a line, in the order of the indices."
    )


def _check_class_folders(dataset: Any, split: str) -> None:
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
    hidden = {name for name in folders if name.startswith(".")}
    faults = (
        (hidden & inside, "hidden folders hold images and would become classes: {}. Remove them"),
        (
            inside - folders,
            "images in no folder of a class: {}. Each must be in one that has its name",
        ),
        (folders - inside - hidden, "no images in {}. Add images or remove the empty folders"),
    )
    for names, fault in faults:
        if names:
            wrong = fault.format(_listing(sorted(names)))
            raise ValueError(f"{split}: {wrong} (in {str(root)!r}).")


def _check_classes(expected: Iterable[str], found: Iterable[str], split: str) -> None:
    """Raise ValueError if ``split`` has a class without index, or, but for a test, lacks one.

    A class that validation lacks would silently not count.
    """
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(
            f"{split} has classes that are not among the {len(set(expected))} known ones (those of "
            f"training, or of the --data.classes file): {_listing(unknown)}. Add training images "
            "of them, remove them, or correct the spelling."
        )
    absent = sorted(set(expected) - set(found))
    if absent and split != "test":
        raise ValueError(
            f"{split} has no images of {_listing(absent)}, which training (or the --data.classes "
            f"file) has. Add a folder with images of them to {split}, or remove them there."
        )


def _canonical_order(names: Iterable[str]) -> dict[str, int]:
    """Name -> index as timm sorts folders (numbers by value), but with ties ("1", "01") decided."""
    ordered = sorted(names, key=lambda name: (natural_key(name), name))
    return {name: index for index, name in enumerate(ordered)}


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
