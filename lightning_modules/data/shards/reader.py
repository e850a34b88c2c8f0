"""A folder of shards: its manifest, and any of its images at once.

_info.json         classes, and each split's shards with their sizes
train-000000.tar   WebDataset: 000000000.cls, .jpg (or another), .json of an image, in turn
train.index.npy    an array of `ROW`: where each image is, in the order of the shards
"""

import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from mobileone.io.atomic import replace_text

__all__ = ["ROW", "Manifest", "Split", "has_shards", "open_shards", "shard_lengths"]

ROW = np.dtype([("shard", "<i4"), ("target", "<i4"), ("offset", "<i8"), ("size", "<i8")])
"""An image: number of its shard, class, first byte in the tar, bytes."""

_MANIFEST = "_info.json"  # the name under which timm's own WebDataset reader looks for it, too
_FORMAT = 1


@dataclass(frozen=True)
class Split:
    """One split; the first four fields are what timm's reader takes.

    Attributes:
        name: "train", "validation" or "test".
        num_samples: images.
        filenames: of the shards, in order.
        shard_lengths: images of each shard.
        bytes: size of each shard.
        index: file of an array of `ROW`, one row an image, in the order of the shards.
    """

    name: str
    num_samples: int
    filenames: list[str]
    shard_lengths: list[int]
    bytes: list[int]
    index: str

    def __post_init__(self) -> None:
        for name in (*self.filenames, self.index):
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a shard: it leads elsewhere")


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        classes: names in the order of their indices.
        splits: by name.
    """

    classes: list[str]
    splits: dict[str, Split]

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read the manifest of ``root``.

        Raises:
            ValueError: there is none, or it is damaged, or of another format.
        """
        path, known = root / _MANIFEST, [field.name for field in fields(Split)]
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r} in place of {_FORMAT}")
            splits = raw["splits"].items()
            return cls(
                list(raw["classes"]), {s: Split(*map(d.__getitem__, known)) for s, d in splits}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a manifest of `mobileone shards`: {error!r}. Write the "
                "shards again with that command."
            ) from error

    def save(self, root: Path) -> None:
        """Write the manifest, under another name that is then changed."""
        replace_text(root / _MANIFEST, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1))


def has_shards(root: Path | None) -> bool:
    """Whether ``root`` has the manifest of `mobileone shards`, and not one of timm's own."""
    try:
        return root is not None and "format" in json.loads((root / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False


class ShardReader(Reader):
    """timm's reader of one split: undecoded images in the order of the shards.

    Args:
        root: the folder of the shards.
        split: name of the split in the manifest.
        class_map: class name -> index; None for the manifest's.

    Attributes:
        class_to_idx: class name -> index.
        lengths: images of each shard.

    Raises:
        ValueError: no such split, or a shard of it is missing or of another size.
    """

    def __init__(self, root: Path, split: str, class_map: dict[str, int] | None = None) -> None:
        super().__init__()
        manifest = Manifest.load(root)
        if split not in manifest.splits:
            raise ValueError(
                f"the shards in {str(root)!r} have no split {split!r}. They have "
                f"{', '.join(manifest.splits)}."
            )
        described = manifest.splits[split]
        self.class_to_idx = class_map or {c: i for i, c in enumerate(manifest.classes)}
        self.lengths = described.shard_lengths
        self._targets = [self.class_to_idx[c] for c in manifest.classes]
        self._paths = [root / file for file in described.filenames]
        sizes = zip(self._paths, described.bytes, strict=True)
        faults = [p.name for p, size in sizes if not p.is_file() or p.stat().st_size != size]
        if faults:
            raise ValueError(
                f"{len(faults)} of the files in {str(root)!r} are missing or not as they were "
                f"written: {', '.join(faults[:5])}. Copy them again, or remove the folder and "
                "write it again with `mobileone shards SRC DST`."
            )
        self._index = np.load(root / described.index, mmap_mode="r")

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


def open_shards(root: Path, split: str, class_map: dict[str, int] | None = None) -> ImageDataset:
    """timm's dataset of a split of the shards; raises what `ShardReader` raises."""
    return ImageDataset(str(root), reader=ShardReader(root, split, class_map))


def shard_lengths(dataset: object) -> list[int] | None:
    """How many images each shard has; None if the dataset does not come from shards."""
    reader = dataset.reader if isinstance(dataset, ImageDataset) else None
    return reader.lengths if isinstance(reader, ShardReader) else None
