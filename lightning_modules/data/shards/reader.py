"""A timm reader of the shards that `mobileone shards` writes: any image at once, by its index."""

import io
from pathlib import Path

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from lightning_modules.data.shards.format import Manifest

__all__ = ["ShardReader", "open_shards", "shard_lengths"]


class ShardReader(Reader):
    """The undecoded images of one split, in the order of the shards.

    Args:
        root: the folder of the shards.
        split: name of the split, or a usual synonym of it.
        class_map: class name -> index; None for the manifest's.

    Attributes:
        class_to_idx: class name -> index.
        lengths: images of each shard.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: no such split, a shard of another size than was written, or an index that names
            a class, a shard or a place that there is not.
    """

    def __init__(self, root: Path, split: str, class_map: dict[str, int] | None = None) -> None:
        super().__init__()
        manifest = Manifest.load(root)
        name = split if split in manifest.splits else _SYNONYMS.get(split, split)
        if name not in manifest.splits:
            raise ValueError(
                f"the shards in {str(root)!r} have no split {split!r}. They have "
                f"{', '.join(manifest.splits)}."
            )
        described = manifest.splits[name]
        self.class_to_idx = class_map or {c: i for i, c in enumerate(manifest.classes)}
        self._targets = [self.class_to_idx[c] for c in manifest.classes]
        self.lengths = described.shard_lengths
        self._paths = [root / file for file in described.filenames]
        for path, size in zip(self._paths, described.bytes, strict=True):
            if not path.is_file():
                raise FileNotFoundError(f"shard {str(path)!r} is missing. Copy it there again.")
            if path.stat().st_size != size:
                raise ValueError(
                    f"shard {str(path)!r} has {path.stat().st_size} bytes, not {size}. Copy it "
                    "there again."
                )
        self._index = np.load(root / described.index, mmap_mode="r")
        if len(self._index) != described.num_samples:
            raise ValueError(
                f"{str(root / described.index)!r} lists {len(self._index)} images, not "
                f"{described.num_samples}. Copy it there again."
            )
        _check_index(self._index, root / described.index, len(self._targets), described.bytes)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        """The file of an image and its class."""
        shard, target, offset, size = self._index[index].item()
        with self._paths[shard].open("rb", buffering=0) as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), self._targets[target]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self._paths[int(self._index[index]["shard"])]
        return f"{index:09d} in {path.name if basename or not absolute else path}"


def _check_index(index: np.ndarray, path: Path, classes: int, sizes: list[int]) -> None:
    """Refuse rows that point elsewhere: -1 would be read as the last class without a word."""
    shard, target = index["shard"], index["target"]
    ends = np.asarray([*sizes, -1])[np.where((shard >= 0) & (shard < len(sizes)), shard, -1)]
    wrong = {
        "class": (target < 0) | (target >= classes),
        "shard": ends < 0,
        "place": (index["offset"] < 0) | (index["size"] < 0),
    }
    wrong["place"] |= (index["offset"] + index["size"] > ends) & ~wrong["shard"]
    for what, rows in wrong.items():
        if rows.any():
            first = int(rows.argmax())
            raise ValueError(
                f"{str(path)!r} gives image {first} a {what} that there is not: {index[first]}, "
                f"with {classes} classes and {len(sizes)} shards. Copy the file there again, or "
                "let `mobileone shards SRC DST` mend the folder."
            )


_SYNONYMS = {
    "val": "validation",
    "valid": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "training": "train",
    "testing": "test",
}


def open_shards(root: Path, split: str, class_map: dict[str, int] | None = None) -> ImageDataset:
    """timm's dataset of a split of the shards; raises what `ShardReader` raises."""
    return ImageDataset(str(root), reader=ShardReader(root, split, class_map))


def shard_lengths(dataset: object) -> list[int] | None:
    """How many images each shard has; None if the dataset does not come from shards."""
    reader = dataset.reader if isinstance(dataset, ImageDataset) else None
    return reader.lengths if isinstance(reader, ShardReader) else None
