"""A folder of shards: its manifest, whether it is as written, and any of its images at once.

_info.json         classes, and each split's shards with their sizes and checksums
train-000000.tar   WebDataset: 000000000.cls, .jpg (or another), .json of an image, in turn
train.index.npy    an array of `ROW`: where each image is, in the order of the shards
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from mobileone.io.atomic import replace_text
from mobileone.io.checksum import file_sha256

__all__ = ["ROW", "Manifest", "Split", "has_shards", "open_shards", "shard_lengths"]
__all__ += ["verify_shards"]

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
        sha256: of each shard.
        index: file of an array of `ROW`, one row an image, in the order of the shards.
        index_sha256: of that file.
    """

    name: str
    num_samples: int
    filenames: list[str]
    shard_lengths: list[int]
    bytes: list[int]
    sha256: list[str]
    index: str
    index_sha256: str

    def __post_init__(self) -> None:
        for name in (*self.filenames, self.index):
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a shard: it leads elsewhere")

    def faults(self, root: Path, read_all: bool) -> Iterator[str]:
        """What is not as it was written; the shards' contents only if ``read_all``."""
        index = root / self.index
        if not index.is_file() or file_sha256(index) != self.index_sha256:
            yield f"{self.index} is missing or damaged"
        for name, size, sha256 in zip(self.filenames, self.bytes, self.sha256, strict=True):
            path = root / name
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != size:
                yield f"{name} has {path.stat().st_size} bytes, not {size}"
            elif read_all and file_sha256(path) != sha256:
                yield f"{name} has another checksum"


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        classes: names in the order of their indices.
        plan: digest of the list of images and of how it was cut into shards.
        splits: by name.
    """

    classes: list[str]
    plan: str
    splits: dict[str, Split]

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read the manifest of ``root``.

        Raises:
            ValueError: there is none, or it is damaged, or of another format.
        """
        path = root / _MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r} in place of {_FORMAT}")
            splits = {name: Split(**split) for name, split in raw["splits"].items()}
            return cls(list(raw["classes"]), raw["plan"], splits)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a manifest of `mobileone shards`: {error!r}. Write the "
                "shards again with that command."
            ) from error

    def save(self, root: Path) -> None:
        """Write the manifest, under another name that is then changed."""
        replace_text(root / _MANIFEST, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1))

    def check(self, root: Path, *splits: str, read_all: bool = False) -> None:
        """Raise ValueError, with a list, if files of these splits are not as they were written."""
        faults = [f for name in splits for f in self.splits[name].faults(root, read_all)]
        if faults:
            more = f"; and {len(faults) - 5} more" if faults[5:] else ""
            raise ValueError(
                f"{len(faults)} of the files in {str(root)!r} are not as they were written: "
                f"{'; '.join(faults[:5])}{more}. Copy them again, or remove the folder and write "
                "it again with `mobileone shards SRC DST`."
            )


def has_shards(root: Path | None) -> bool:
    """Whether ``root`` has the manifest of `mobileone shards`, and not one of timm's own."""
    try:
        return root is not None and "plan" in json.loads((root / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False


def verify_shards(root: str | Path) -> Manifest:
    """Read every shard and compare it with the manifest.

    Raises:
        ValueError: there is no manifest, or something differs; lists what.
    """
    folder = Path(root).expanduser()
    manifest = Manifest.load(folder)
    manifest.check(folder, *manifest.splits, read_all=True)
    return manifest


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
        ValueError: no such split, or a file of it is missing or not as it was written.
    """

    def __init__(self, root: Path, split: str, class_map: dict[str, int] | None = None) -> None:
        super().__init__()
        manifest = Manifest.load(root)
        if split not in manifest.splits:
            raise ValueError(
                f"the shards in {str(root)!r} have no split {split!r}. They have "
                f"{', '.join(manifest.splits)}."
            )
        manifest.check(root, split)
        described = manifest.splits[split]
        self.class_to_idx = class_map or {c: i for i, c in enumerate(manifest.classes)}
        self.lengths = described.shard_lengths
        self._targets = [self.class_to_idx[c] for c in manifest.classes]
        self._paths = [root / file for file in described.filenames]
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
