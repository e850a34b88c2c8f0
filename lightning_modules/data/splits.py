"""The splits of one data set, opened when needed, with one class index for all of them."""

from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.data.classes import (
    canonical_order,
    check_all_classes,
    check_class_folders,
    check_known_classes,
    class_to_index,
    read_class_file,
)
from lightning_modules.data.shards.format import Manifest
from lightning_modules.splits import (
    FOLDER_NAMES,
    find_split,
    is_indexed,
    missing_split,
    open_split,
)

__all__ = ["Catalogue"]


class Catalogue:
    """Opens the splits "train", "val" and "test" through timm and checks them.

    Args:
        name: data set in timm's words; one of `FOLDER_NAMES` for folders and tars.
        root: where it lies; may be None for data sets that their reader finds itself.
        train, val, test: the data set's names of the splits; ``test=None`` means the folder test/
            if there is one, else the validation split.
        classes: file for `read_class_file`, or None.
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
        self._name = name
        self._root = root
        self._names = {"train": train, "val": val, "test": test or self._default_test(val)}
        self._class_file = read_class_file(classes) if classes else None
        self._options = options
        self._opened: dict[str, Any] = {}

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
        check_class_folders(dataset, split)
        names = class_to_index(dataset)
        return canonical_order(names) if self._folders else names

    def source(self, split: str) -> Any:
        """timm's dataset of ``split``, its targets being indices of `class_index`.

        Raises:
            FileNotFoundError: no root or no such split; says what is there.
            ValueError: no images, an empty class, or other classes than `class_index` has.
        """
        if split == "test" and self._tests_validation:
            split = "val"  # with the checks of validation
        if split not in self._opened:
            if self._folders:
                self._place(split)  # a missing split before anything about classes
            self._opened[split] = self._checked(split)
        return self._opened[split]

    def _checked(self, split: str) -> Any:
        dataset = self._open(split, None)
        if not self._folders and not self._indexed:
            return dataset
        check_class_folders(dataset, split)
        names = class_to_index(dataset)
        check_known_classes(self.class_index, names, split)
        if split != "test":
            check_all_classes(self.class_index, names, split)
        return dataset if names == self.class_index else self._open(split, self.class_index)

    @property
    def _tests_validation(self) -> bool:
        if self._folders:
            path = self._path("test")
            return path is not None and path == self._path("val")
        return self._names["test"] == self._names["val"]

    @property
    def _folders(self) -> bool:
        return self._name in FOLDER_NAMES

    @property
    def _indexed(self) -> bool:
        return is_indexed(self._name, self._root)

    def _default_test(self, val: str) -> str:
        if self._root is not None and self._indexed:
            return "test" if "test" in Manifest.load(self._root).splits else val
        has_test = self._root is not None and find_split(self._root, "test") is not None
        return "test" if self._folders and has_test else val

    def _path(self, split: str) -> Path | None:
        return None if self._root is None else find_split(self._root, self._names[split])

    def _place(self, split: str) -> Path:
        path = self._path(split)
        if path is None:
            assert self._root is not None
            raise missing_split(self._root, self._names[split])
        return path

    def _open(self, split: str, class_map: dict[str, int] | None, download: bool = False) -> Any:
        return open_split(
            self._name,
            self._place(split) if self._folders else self._root,
            self._names[split],
            class_map,
            is_training=split == "train",
            download=download,
            **self._options,
        )
