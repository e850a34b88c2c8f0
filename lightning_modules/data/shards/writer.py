"""Write a folder of images as shards."""

import json
import random
import sys
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from rich.progress import track

from lightning_modules.data.shards.reader import ROW, Manifest, Split
from lightning_modules.data.splits import DatasetSplits, find_split
from mobileone.io.atomic import directory_lock, publish_folder

__all__ = ["make_shards"]


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
    ``<destination>.partial``, which is renamed when it is complete.

    Args:
        source: folder with ``train/<class>/*``, ``val/<class>/*`` and, perhaps, ``test/<class>/*``.
        destination: a new or an empty folder.
        images_per_shard: the last shard of a split may have fewer. 2000 of ImageNet's are 220 MB.
        classes: text file, one class a line, that fixes names and indices.
        seed: of the order in which training images are dealt to the shards.

    Raises:
        FileNotFoundError: no such folder or split.
        FileExistsError: ``destination`` holds something, or another process writes it.
        ValueError: classes that do not agree, or a number out of its range.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1.")
    root, target = Path(source).expanduser(), Path(destination).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} holds something: give a new or an empty folder")
    splits = DatasetSplits("", root, "train", "validation", None, classes)
    parts = {"train": "train", "validation": "val"}
    if root.is_dir() and find_split(root, "test") is not None:
        parts["test"] = "test"
    images = {split: splits.source(part).reader.samples for split, part in parts.items()}
    shuffled = list(images["train"])
    random.Random(seed).shuffle(shuffled)  # a shard must hold images of all classes
    images["train"] = shuffled
    index = splits.class_index
    names = sorted(index, key=index.__getitem__)
    partial = target.with_name(f"{target.name}.partial")
    with directory_lock(partial):
        for left in partial.iterdir():  # of a run that was killed
            left.unlink()
        written = {s: _write_split(partial, s, images[s], images_per_shard) for s in images}
        manifest = Manifest(names, written)
        manifest.save(partial)
        publish_folder(partial, target)
    return manifest


def _write_split(
    folder: Path, split: str, images: Sequence[tuple[str, int]], images_per_shard: int
) -> Split:
    """Write the shards of a split, of images (file, class), and its index."""
    starts = range(0, len(images), images_per_shard)
    tars: list[Path] = []
    rows: list[tuple[int, int, int, int]] = []
    for first in track(starts, f"{split} shards", disable=not sys.stdout.isatty()):
        tars.append(folder / f"{split}-{len(tars):06d}.tar")
        # the format without extended headers: a file begins one block after its header
        with tarfile.open(tars[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            part = images[first : first + images_per_shard]
            for number, (file, label) in enumerate(part, first):
                path, key = Path(file), f"{number:09d}"
                suffix = path.suffix.lower().replace("jpeg", "jpg")
                content = path.read_bytes()
                _add(tar, f"{key}.cls", str(label).encode())
                start = tar.offset + tarfile.BLOCKSIZE
                rows.append((len(tars) - 1, label, start, len(content)))
                _add(tar, f"{key}{suffix}", content)
                name = {"filename": f"{path.parent.name}/{path.name}"}
                _add(tar, f"{key}.json", json.dumps(name).encode())
    index = folder / f"{split}.index.npy"
    np.save(index, np.array(rows, dtype=ROW))
    lengths = [min(images_per_shard, len(images) - first) for first in starts]
    names, sizes = [tar.name for tar in tars], [tar.stat().st_size for tar in tars]
    return Split(split, len(images), names, lengths, sizes, index.name)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time: the bytes depend on the images alone
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
