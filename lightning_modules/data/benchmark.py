"""How many images a second the data module delivers, by reader and workers."""

import io
import shutil
import statistics
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from rich.table import Table

from lightning_modules.checks import check_model_name
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.image_io import find_images
from lightning_modules.data.shards.writer import make_shards
from mobileone.bench.results import Result
from mobileone.bench.show.tables import make_table, number, words
from mobileone.bench.training_step.worker import training_step

__all__ = ["benchmark_data", "data_table", "data_verdict"]

READERS = {"folder": "", "tar": "tar", "shards": "wds"}
"""Name in the table -> the data module's `dataset`."""


def benchmark_data(
    root: str | Path | None = None,
    readers: Sequence[str] = tuple(READERS),
    workers: Sequence[int] = (0, 2),
    images: int = 512,
    batch_size: int = 32,
    image_size: int = 224,
    rounds: int = 5,
    model: str | None = None,
    device: str = "cpu",
    workspace: str | Path | None = None,
) -> Result:
    """Measure the training loader over the same images, stored in several ways.

    Every round makes one pass with each combination, in turn, so that what else the machine does
    meets them all. A pass of each goes before, which starts the workers; the files then come from
    the system's cache, unless memory is short.

    Args:
        root: folder with ``train/<class>/*``, of which ``images`` are copied; None for copies of
            two photographs (CC BY, 640 × 427) that come with scikit-learn.
        readers: "folder" (a file an image), "tar" (a tar a split), "shards" (`mobileone shards`).
        workers: numbers of processes in addition to this one.
        images: how many, at most.
        batch_size: images a batch.
        image_size: side of the crops, in pixels.
        rounds: timed passes of each combination.
        model: time a training step of this timm model too, and report what limits a run.
        device: "cpu" or "cuda", for that step.
        workspace: folder for the copies, on the disk to be measured; None for the temporary one.

    Returns:
        A result of the kind `data`; rows have `reader`, `workers`, `images_per_s` (median
        over the passes), `slowest_images_per_s`, `fastest_images_per_s`, and `cpu_ms`,
        processor time of this process for an image, all there is where there are no workers. The
        protocol has `model_images_per_s` of the training step: forward, backward, SGD; None without
        a model.

    Raises:
        FileNotFoundError: no images under ``root``.
        ValueError: a name or a number is out of range.
    """
    _check(readers, images, batch_size, image_size, rounds)
    if model is not None:
        check_model_name(model)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: this machine has no CUDA device. Use cpu.")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=workspace)))
        files = _copy(None if root is None else Path(root).expanduser(), place / "folder", images)
        _store(place, readers)
        combinations = list(product(readers, workers))
        loaders = []
        for reader, count in combinations:
            data = ImageDataModule(
                str(place / reader),
                READERS[reader],
                input_size=image_size,
                batch_size=min(batch_size, len(files)),
                num_workers=count,
                drop_last=False,
                seed=0,
            )
            data.setup("fit")
            loaders.append(data.train_dataloader())
        # a pass each, of which no batch is kept
        runs: list[Callable[[], Any]] = [partial(deque, loader, maxlen=0) for loader in loaders]
        costs = _time_in_turn(runs, rounds)
        size = sum(file.stat().st_size for file in files) / len(files)
        del loaders, runs  # whose workers end before their files do
    rows = []
    for (reader, count), passes in zip(combinations, costs, strict=True):
        speeds = [len(files) / wall for wall, _ in passes]
        rows.append(
            {
                "reader": reader,
                "workers": count,
                "images_per_s": statistics.median(speeds),
                "slowest_images_per_s": min(speeds),
                "fastest_images_per_s": max(speeds),
                "cpu_ms": statistics.median(cpu for _, cpu in passes) / len(files) * 1e3,
            }
        )
    step = None
    if model is not None:
        step = _step_speed(model, batch_size, image_size, rounds, device)
    how = {
        "images": len(files),
        "mean_bytes": size,
        "batch_size": batch_size,
        "image_size": image_size,
        "rounds": rounds,
        "statistic": "images_per_s",
        "model": model,
        "model_images_per_s": step,
        "device": device,
    }
    return Result.new("data", how, rows, device)


def data_verdict(result: Result) -> str:
    """Whether data or computation limits a run, in a sentence."""
    how, best = result.protocol, max(result.rows, key=lambda row: row["images_per_s"])
    speed, step = best["images_per_s"], how["model_images_per_s"]
    data = f"{best['reader']} and {best['workers']} workers give {speed:.0f} images/s"
    if step is None:
        return f"{data}; give --model for what training needs"
    return (
        f"bound by {'data' if speed < step else 'compute'}: {data}, and a training step of "
        f"{how['model']} on {how['device']} takes {step:.0f} images/s"
    )


def data_table(result: Result) -> Table:
    """The rows for a terminal, with their speed relative to the first row's, and the verdict."""
    how, first = result.protocol, result.rows[0]["images_per_s"]
    columns = (
        words("reader", "reader"),
        words("workers", "workers"),
        number("images/s", "images_per_s", ".0f"),
        number("slowest", "slowest_images_per_s", ".0f"),
        number("fastest", "fastest_images_per_s", ".0f"),
        number("× first row", "images_per_s", ".2f", first),
        number("CPU ms", "cpu_ms"),
    )
    title = (
        f"Training images, {how['images']} of {how['mean_bytes'] / 1e3:.0f} kB in crops of "
        f"{how['image_size']} px, batches of {how['batch_size']}, {result.machine['cpu']}, torch "
        f"{result.versions['torch']}, medians of {how['rounds']} passes"
    )
    return make_table(title, columns, result.rows, [data_verdict(result)])


def _check(
    readers: Sequence[str], images: int, batch_size: int, image_size: int, rounds: int
) -> None:
    for name in readers:
        if name not in READERS:
            raise ValueError(f"reader {name!r} is unknown. There are {', '.join(READERS)}.")
    if min(images, batch_size, image_size, rounds) < 1:
        raise ValueError(
            f"images={images}, batch_size={batch_size}, image_size={image_size} and "
            f"rounds={rounds} must be at least 1."
        )


def _copy(root: Path | None, folder: Path, count: int) -> list[Path]:
    """Write ``count`` images as ``folder/train/images/*``, and one for validation."""
    train, val = folder / "train" / "images", folder / "val" / "images"
    for split in (train, val):
        split.mkdir(parents=True)
    if root is None:
        for number, content in zip(range(count), _photographs(), strict=False):
            (train / f"{number}.jpg").write_bytes(content)
    else:
        found = find_images(root / "train")
        for number, file in enumerate(found[:: max(1, len(found) // count)][:count]):
            shutil.copyfile(file, train / f"{number}{file.suffix}")
    files = sorted(train.iterdir())
    shutil.copyfile(files[0], val / files[0].name)
    return files


def _photographs() -> Iterator[bytes]:
    """Two photographs in the usual sizes and qualities of ImageNet's, again and again."""
    from sklearn.datasets import load_sample_images  # a second of import

    sizes, qualities = ((500, 333), (500, 375), (375, 500), (640, 427)), (85, 90, 95)
    kinds = []
    for pixels, size, quality in product(load_sample_images().images, sizes, qualities):
        buffer = io.BytesIO()
        photograph = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        photograph.save(buffer, "JPEG", quality=quality)
        kinds.append(buffer.getvalue())
    while True:
        yield from kinds


def _store(place: Path, readers: Sequence[str]) -> None:
    if "tar" in readers:
        (place / "tar").mkdir()
        for split in ("train", "val"):
            with tarfile.open(place / "tar" / f"{split}.tar", "w") as tar:
                tar.add(place / "folder" / split, ".")
    if "shards" in readers:
        make_shards(place / "folder", place / "shards")


def _time_in_turn(
    actions: Sequence[Callable[[], Any]], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and processor seconds of each action in each round, after one untimed round."""
    costs: list[list[tuple[float, float]]] = [[] for _ in actions]
    for turn in range(1 + rounds):
        for action, own in zip(actions, costs, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            if turn > 0:
                own.append((time.perf_counter() - wall, time.process_time() - cpu))
    return costs


def _step_speed(model: str, batch_size: int, image_size: int, rounds: int, device: str) -> float:
    """Images a second of training steps on images that are there already."""
    network = timm.create_model(model).to(device).train()
    images = torch.randn(batch_size, 3, image_size, image_size).to(device)
    take_step = training_step(network, images)

    def step() -> None:
        take_step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    (costs,) = _time_in_turn([step], rounds)
    return batch_size / statistics.median(wall for wall, _ in costs)
