"""Write an ImageFolder as WebDataset shards; a run that was killed goes on where it stopped."""

import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import track

from lightning_modules.data.shards.format import (
    MANIFEST,
    PARTS,
    ROW,
    Manifest,
    Split,
    describe_split,
    digest,
    faulty_files,
    has_shards,
    scan_shard,
    write_beside,
)
from lightning_modules.data.splits import DatasetSplits, find_split
from mobileone.io.atomic import flush

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

    The files are a function of the arguments and the images alone: a run that was killed and
    started again ends with the same bytes as one that was not. Each shard is written beside its
    place, read back, and renamed; the manifest (`_info.json`) comes last. What stands there already
    is read and compared with its checksum, and written again from ``source`` where it differs.

    Args:
        source: folder with ``train/<class>/*``, ``val/<class>/*`` and, perhaps, ``test/<class>/*``.
        destination: a new folder, that of a run that was stopped, or finished shards to repair.
        images_per_shard: the last shard of a split may have fewer. 2000 of ImageNet's are 220 MB.
        classes: text file, one class a line, that fixes names and indices.
        seed: of the order in which training images are dealt to the shards.

    Raises:
        FileNotFoundError: no such folder or split.
        FileExistsError: ``destination`` holds something else.
        ImportError: the package `webdataset` is not installed.
        ValueError: classes that do not agree, or a number out of its range.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1.")
    _check_webdataset()
    root, target = Path(source).expanduser(), Path(destination).expanduser()
    names, shards = _plan(root, classes, images_per_shard, seed)
    plan = _digest_of(root, names, shards)
    if (finished := _finished(target, plan)) is not None:
        if not (faulty := faulty_files(target, finished)):
            return finished
        _reopen(target, plan, shards, faulty)
    _claim(target, plan)
    for shard in track(shards, f"{len(shards)} shards", disable=not sys.stdout.isatty()):
        if not _is_done(target, shard):
            _write(target, shard)
    manifest = Manifest(names, plan, {s.name: s for s in _describe(target, shards)})
    manifest.save(target)
    shutil.rmtree(target / PARTS)
    return manifest


def _check_webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "shards are written by the package webdataset: pip install -e '.[shards]'"
        ) from error


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


def _digest_of(root: Path, names: list[str], shards: list[_Shard]) -> str:
    running = hashlib.sha256(json.dumps(names).encode())
    for shard in shards:
        running.update(f"{shard.filename}\n".encode())
        for file, label in shard.images:
            state = Path(file).stat()  # an image that was changed since is another one
            entry = f"{os.path.relpath(file, root)}\t{label}\t{state.st_size}\t{state.st_mtime_ns}"
            running.update(f"{entry}\n".encode(errors="replace"))
    return running.hexdigest()


def _finished(target: Path, plan: str) -> Manifest | None:
    """The manifest, if these very shards have been written already."""
    if not (target / MANIFEST).is_file() or not has_shards(target):
        return None
    manifest = Manifest.load(target)
    if manifest.plan != plan:
        raise _other_shards(target)
    shutil.rmtree(target / PARTS, ignore_errors=True)  # of a run that was killed at its very end
    return manifest


def _reopen(target: Path, plan: str, shards: list[_Shard], faulty: list[str]) -> None:
    """Make finished shards those of a run that was stopped, so that what is faulty is written."""
    print(f"written again, for they were not as they were written: {', '.join(faulty)}")
    for shard in shards:
        if shard.filename not in faulty:
            write_beside(_record(target, shard), _described(target / shard.filename, shard))
    (target / PARTS).mkdir(exist_ok=True)
    write_beside(target / PARTS / "plan", plan.encode())
    (target / MANIFEST).unlink()


def _claim(target: Path, plan: str) -> None:
    """Note in the folder what is being written there, or find that noted."""
    note = target / PARTS / "plan"
    if note.is_file():
        if note.read_text(encoding="utf-8") != plan:
            raise _other_shards(target)
        return
    if target.exists() and (not target.is_dir() or any(p.name != PARTS for p in target.iterdir())):
        raise FileExistsError(
            f"{str(target)!r} exists and is no folder of shards. Give a new or an empty one."
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_beside(note, plan.encode())


def _other_shards(target: Path) -> FileExistsError:
    return FileExistsError(
        f"{str(target)!r} holds shards of other images, or images dealt out otherwise. Give the "
        "same arguments as then, or a new folder."
    )


def _record(target: Path, shard: _Shard) -> Path:
    return target / PARTS / f"{shard.filename}.json"


def _is_done(target: Path, shard: _Shard) -> bool:
    record, tar = _record(target, shard), target / shard.filename
    if not record.is_file() or not tar.is_file():
        return False
    try:
        noted = json.loads(record.read_bytes())
        # after a power cut a file may have its size and not its contents
        return tar.stat().st_size == noted["bytes"] and digest(tar) == noted["sha256"]
    except (ValueError, KeyError, TypeError):
        return False


def _write(target: Path, shard: _Shard) -> None:
    from webdataset import TarWriter

    partial = target / f".{shard.filename}.partial"
    with partial.open("wb") as file:
        # no time of its own and a fixed owner: the bytes depend on the images alone
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for number, (path, label) in enumerate(shard.images, shard.first):
                tar.write(_sample(number, Path(path), label))
        file.flush()
        os.fsync(file.fileno())
    record = _described(partial, shard)
    partial.replace(target / shard.filename)
    flush(target)
    write_beside(_record(target, shard), record)


def _described(tar: Path, shard: _Shard) -> bytes:
    rows = scan_shard(tar, shard.number)
    labels = [label for _, label in shard.images]
    if rows["target"].tolist() != labels:
        raise OSError(f"{tar} holds {len(rows)} images, not the {len(labels)} written to it.")
    record = {"bytes": tar.stat().st_size, "sha256": digest(tar), "rows": rows.tolist()}
    return json.dumps(record).encode()


def _sample(number: int, path: Path, label: int) -> dict[str, str | bytes]:
    """An image in WebDataset's words: key, class, image, and where it came from."""
    suffix = path.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    name = {"filename": f"{path.parent.name}/{path.name}"}
    return {
        "__key__": f"{number:09d}",
        "cls": str(label).encode(),
        suffix: path.read_bytes(),
        "json": json.dumps(name).encode(),
    }


def _describe(target: Path, shards: list[_Shard]) -> Iterator[Split]:
    """Write the index of each split; return what the manifest says of it."""
    for name in dict.fromkeys(shard.split for shard in shards):
        own = [shard for shard in shards if shard.split == name]
        records = [json.loads(_record(target, shard).read_bytes()) for shard in own]
        rows = [np.array([tuple(row) for row in r["rows"]], dtype=ROW) for r in records]
        files = [(s.filename, r["bytes"], r["sha256"]) for s, r in zip(own, records, strict=True)]
        split = describe_split(name, rows, files)
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(rows))
        write_beside(target / split.index, buffer.getvalue())
        yield replace(split, index_sha256=digest(target / split.index))
