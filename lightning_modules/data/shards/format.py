"""The files of a folder of shards: manifest, index and tars, and whether they are as written."""

import hashlib
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mobileone.io.atomic import atomic_write, flush

__all__ = [
    "MANIFEST",
    "PARTS",
    "ROW",
    "Manifest",
    "Split",
    "describe_split",
    "digest",
    "faulty_files",
    "has_shards",
    "scan_shard",
    "verify_shards",
    "write_beside",
]

MANIFEST = "_info.json"
"""The name under which timm's own WebDataset reader looks for it, too."""

PARTS = ".parts"
"""Folder of what is finished while the shards are being written."""

ROW = np.dtype([("shard", "<i4"), ("target", "<i4"), ("offset", "<i8"), ("size", "<i8")])
"""The index's row of an image: number of the shard, class, first byte in the tar, bytes."""

_FORMAT = 1
_CHUNK = 1 << 20


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
                raise ValueError(f"{name!r} is no name of a shard: it must not lead elsewhere")


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
            ValueError: it is damaged, or of another format; the shards are not complete.
        """
        path = root / MANIFEST
        if not path.is_file() and (root / PARTS).is_dir():
            raise ValueError(
                f"the shards in {str(root)!r} are not complete. Run the same `mobileone shards` "
                "command again: it goes on where it was stopped."
            )
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r} in place of {_FORMAT}")
            splits = {name: Split(**split) for name, split in raw["splits"].items()}
            return cls(list(raw["classes"]), raw["plan"], splits)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is no manifest of `mobileone shards`: {error!r}. Write the shards "
                "again with that command."
            ) from error

    def save(self, root: Path) -> None:
        """Write the manifest, beside its place and renamed."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        write_beside(root / MANIFEST, text.encode())


def has_shards(root: Path | None) -> bool:
    """Whether ``root`` holds shards of `mobileone shards`, finished or not."""
    if root is None or not root.is_dir():
        return False
    if (root / PARTS).is_dir():
        return True
    try:  # timm has manifests of this name that are not ours
        return "plan" in json.loads((root / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False


def scan_shard(path: Path, number: int) -> np.ndarray:
    """The rows of one shard's images, read from the headers of the tar.

    Raises:
        ValueError: it is no tar of images that are each preceded by their class.
    """
    rows: list[tuple[int, int, int, int]] = []
    target: int | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                suffix = member.name.rpartition(".")[2]
                if suffix == "cls":
                    file = tar.extractfile(member)
                    assert file is not None
                    target = int(file.read())
                elif suffix != "json":
                    if target is None:
                        raise ValueError(f"{member.name} has no class in front of it")
                    rows.append((number, target, member.offset_data, member.size))
                    target = None
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is not a shard: {error}") from error
    return np.array(rows, dtype=ROW)


def describe_split(name: str, rows: list[np.ndarray], shards: list[tuple[str, int, str]]) -> Split:
    """A `Split` without its index, from each shard's rows and (file name, bytes, sha256)."""
    return Split(
        name=name,
        num_samples=sum(map(len, rows)),
        filenames=[shard[0] for shard in shards],
        shard_lengths=[len(part) for part in rows],
        bytes=[shard[1] for shard in shards],
        sha256=[shard[2] for shard in shards],
        index=f"{name}.index.npy",
        index_sha256="",
    )


def verify_shards(root: str | Path) -> Manifest:
    """Read every shard and compare it with the manifest: size, checksum, count, index.

    Raises:
        FileNotFoundError: no such folder, or no manifest in it.
        ValueError: something differs; lists what.
    """
    folder = Path(root).expanduser()
    if not has_shards(folder):
        raise FileNotFoundError(
            f"{str(folder)!r} holds no shards with a manifest ({MANIFEST}) of `mobileone shards`."
        )
    manifest = Manifest.load(folder)
    faults = _all_faults(folder, manifest)
    if faults:
        said = [f"{name} {fault}" for name, fault in faults.items()]
        shown = "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if said[5:] else "")
        raise ValueError(
            f"{len(faults)} of the files in {str(folder)!r} are not as they were written: {shown}. "
            "`mobileone shards SRC DST` with the arguments of then writes these files again, and "
            "no others; or copy them again."
        )
    return manifest


def faulty_files(root: Path, manifest: Manifest) -> list[str]:
    """Names of the files that are missing or not as they were written; reads all of them."""
    return list(_all_faults(root, manifest))


def _all_faults(root: Path, manifest: Manifest) -> dict[str, str]:
    return {n: f for split in manifest.splits.values() for n, f in _faults(root, split).items()}


def _faults(root: Path, split: Split) -> dict[str, str]:
    """What is wrong, by file."""
    faults = {}
    index = root / split.index
    if not index.is_file() or digest(index) != split.index_sha256:
        faults[split.index] = "is missing or damaged"
        rows = None
    else:
        rows = np.load(index)
        if len(rows) != split.num_samples:
            faults[split.index] = f"has {len(rows)} images, not {split.num_samples}"
    for number, name in enumerate(split.filenames):
        path = root / name
        if not path.is_file():
            faults[name] = "is missing"
        elif path.stat().st_size != split.bytes[number]:
            faults[name] = f"has {path.stat().st_size} bytes, not {split.bytes[number]}"
        elif digest(path) != split.sha256[number]:
            faults[name] = "has another checksum"
        elif rows is not None:
            found = scan_shard(path, number)
            if not np.array_equal(found, rows[rows["shard"] == number]):
                faults[name] = f"has other images than {split.index} says"
    return faults


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    running = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            running.update(chunk)
    return running.hexdigest()


def write_beside(path: Path, content: bytes) -> None:
    """Write a small file under another name, and rename it when it is on the disk."""
    with atomic_write(path) as beside:
        beside.write_bytes(content)
        flush(beside)
