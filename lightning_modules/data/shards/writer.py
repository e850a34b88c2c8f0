"""Write a folder of images as shards; a run that was killed continues where it stopped."""

import hashlib
import json
import os
import random
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from rich.progress import track

from lightning_modules.data.shards.reader import ROW, Manifest, Split, has_shards
from lightning_modules.data.splits import DatasetSplits, find_split
from mobileone.io.atomic import atomic_write, directory_lock, flush, publish_folder
from mobileone.io.checksum import file_sha256

__all__ = ["make_shards"]


@dataclass(frozen=True)
class _Shard:
    """One tar to be written: its images (file, class) and the number of the first of them."""

    split: str
    number: int
    first: int
    images: list[tuple[str, int]]

    @property
    def filename(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


def make_shards(
    source: str | Path,
    destination: str | Path,
    *,
    images_per_shard: int = 2000,
    classes: str | None = None,
    seed: int = 0,
) -> Manifest:
    """Copy the images of ``source``, undecoded, into shards, and describe them in a manifest.

    The files are a function of the arguments and the images alone. They are written to
    ``<destination>.partial-…``, which is renamed when it is complete; the same command continues
    there if it was stopped.

    Args:
        source: folder with ``train/<class>/*``, ``val/<class>/*`` and, perhaps, ``test/<class>/*``.
        destination: a new folder, or that of the same shards, which is left as it is.
        images_per_shard: the last shard of a split may have fewer. 2000 of ImageNet's are 220 MB.
        classes: text file, one class a line, that fixes names and indices.
        seed: of the order in which training images are dealt to the shards.

    Raises:
        FileNotFoundError: no such folder or split.
        FileExistsError: ``destination`` holds something else, or another process writes it.
        ValueError: classes that do not agree, or a number out of its range.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1.")
    root, target = Path(source).expanduser(), Path(destination).expanduser().absolute()
    names, shards = _plan(root, classes, images_per_shard, seed)
    plan = _digest(root, names, shards)
    if has_shards(target) and Manifest.load(target).plan == plan:
        return Manifest.load(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{str(target)!r} exists and holds something else than these shards. Give a new or an "
            "empty folder, or the arguments that it was written with."
        )
    partial = target.with_name(f"{target.name}.partial-{plan[:8]}")
    with directory_lock(partial):
        for shard in track(shards, f"{len(shards)} shards", disable=not sys.stdout.isatty()):
            if not (partial / shard.filename).is_file():
                _write(partial, shard)
        splits = dict.fromkeys(shard.split for shard in shards)
        described = {s: _describe(partial, s, [x for x in shards if x.split == s]) for s in splits}
        Manifest(names, plan, described).save(partial)
        publish_folder(partial, target)
        for path in (*target.glob(".*"), *target.glob("*.npz")):
            path.unlink(missing_ok=True)
    return Manifest.load(target)


def _plan(
    root: Path, classes: str | None, images_per_shard: int, seed: int
) -> tuple[list[str], list[_Shard]]:
    """The names of the classes, and every shard."""
    splits = DatasetSplits("", root, "train", "validation", None, classes)
    parts = {"train": "train", "validation": "val"}
    if root.is_dir() and find_split(root, "test") is not None:
        parts["test"] = "test"
    shards = []
    for split, part in parts.items():
        images = [(str(file), int(label)) for file, label in splits.source(part).reader.samples]
        if split == "train":  # a shard must hold images of all classes
            random.Random(seed).shuffle(images)
        for number, first in enumerate(range(0, len(images), images_per_shard)):
            shards.append(_Shard(split, number, first, images[first : first + images_per_shard]))
    index = splits.class_index
    return sorted(index, key=index.__getitem__), shards


def _digest(root: Path, names: list[str], shards: list[_Shard]) -> str:
    running = hashlib.sha256(json.dumps(names).encode())
    for shard in shards:
        running.update(f"{shard.filename}\n".encode())
        for file, label in shard.images:
            state = Path(file).stat()  # an image that was changed since is another one
            entry = f"{os.path.relpath(file, root)}\t{label}\t{state.st_size}\t{state.st_mtime_ns}"
            running.update(f"{entry}\n".encode(errors="replace"))
    return running.hexdigest()


def _write(folder: Path, shard: _Shard) -> None:
    """Write the tar; before it gets its name, collect its rows of index and manifest."""
    rows = []
    with atomic_write(folder / shard.filename) as partial:
        # the format without extended headers: a file begins one block after its header
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (file, label) in enumerate(shard.images, shard.first):
                path, key = Path(file), f"{number:09d}"
                suffix = path.suffix.lower().replace("jpeg", "jpg")
                content = path.read_bytes()
                _add(tar, f"{key}.cls", str(label).encode())
                rows.append((shard.number, label, tar.offset + tarfile.BLOCKSIZE, len(content)))
                _add(tar, f"{key}{suffix}", content)
                name = {"filename": f"{path.parent.name}/{path.name}"}
                _add(tar, f"{key}.json", json.dumps(name).encode())
        flush(partial)
        with atomic_write(folder / f"{shard.filename}.npz") as record:
            np.savez(record, rows=np.array(rows, dtype=ROW), sha256=file_sha256(partial))
            flush(record)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time: the bytes depend on the images alone
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def _describe(folder: Path, name: str, shards: list[_Shard]) -> Split:
    """Write the index of a split; return its entry in the manifest."""
    records = []
    for shard in shards:
        with np.load(folder / f"{shard.filename}.npz") as record:
            records.append((record["rows"], str(record["sha256"])))
    index = folder / f"{name}.index.npy"
    with atomic_write(index) as partial:
        np.save(partial, np.concatenate([rows for rows, _ in records]))
    return Split(
        name=name,
        num_samples=sum(len(shard.images) for shard in shards),
        filenames=[shard.filename for shard in shards],
        shard_lengths=[len(shard.images) for shard in shards],
        bytes=[(folder / shard.filename).stat().st_size for shard in shards],
        sha256=[sha256 for _, sha256 in records],
        index=index.name,
        index_sha256=file_sha256(index),
    )
