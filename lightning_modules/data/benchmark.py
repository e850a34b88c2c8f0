"""How many images a second the data module delivers, by reader, workers and decoder."""

import io
import json
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_modules.checks import check_model_name
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.dataset import ImageClassificationDataset
from lightning_modules.data.decoders import DECODERS, accept_tensors
from lightning_modules.data.image_io import find_images
from lightning_modules.data.shards.writer import make_shards
from lightning_modules.data.transforms import PhasedTransform

__all__ = ["DataBenchmark", "Throughput", "benchmark_data"]

READERS = {"folder": "", "tar": "tar", "shards": "wds"}
"""Name in the table -> the data module's `dataset`."""


@dataclass(frozen=True)
class Throughput:
    """What one combination delivers.

    Attributes:
        reader: "folder", "tar" or "shards".
        workers: processes beside the one that asks.
        decoder: "pillow" or "torchvision".
        images_per_second: median over the passes.
        slowest: images a second of the slowest pass.
        fastest: images a second of the fastest pass.
        cpu_ms: processor time of this process for an image, in ms, median; all there is where
            there are no workers.
    """

    reader: str
    workers: int
    decoder: str
    images_per_second: float
    slowest: float
    fastest: float
    cpu_ms: float


@dataclass(frozen=True)
class DataBenchmark:
    """The measurements and where they were taken.

    Attributes:
        rows: one for each combination.
        images: images a pass.
        mean_bytes: size of an image file.
        batch_size: images a batch.
        image_size: height and width of the crops, in pixels.
        rounds: timed passes of each combination.
        machine: kind of processor and number of cores.
        torch_version: version of PyTorch.
        model: the network whose training step was timed, or None.
        model_images_per_second: of that step: forward, backward, SGD; None without a model.
        device: where the step was timed.
    """

    rows: tuple[Throughput, ...]
    images: int
    mean_bytes: float
    batch_size: int
    image_size: int
    rounds: int
    machine: str
    torch_version: str
    model: str | None
    model_images_per_second: float | None
    device: str

    @property
    def fastest(self) -> Throughput:
        """The combination with the best median."""
        return max(self.rows, key=lambda row: row.images_per_second)

    @property
    def verdict(self) -> str:
        """Whether a run is bound by data or by compute, in a sentence."""
        best, step = self.fastest, self.model_images_per_second
        data = (
            f"{best.reader}, {best.workers} workers and {best.decoder} give "
            f"{best.images_per_second:.0f} images/s"
        )
        if step is None:
            return f"{data}; give --model for what training needs"
        bound = "data" if best.images_per_second < step else "compute"
        return (
            f"bound by {bound}: {data}, and a training step of {self.model} on {self.device} takes "
            f"{step:.0f} images/s"
        )

    def table(self) -> Table:
        """The rows for a terminal; times are relative to the first row's."""
        table = Table(
            title=f"Training images, {self.images} of {self.mean_bytes / 1e3:.0f} kB in crops of "
            f"{self.image_size} px, batches of {self.batch_size}, {self.machine}, torch "
            f"{self.torch_version}, medians of {self.rounds} passes"
        )
        for heading in ("reader", "workers", "decoder"):
            table.add_column(heading)
        for heading in ("images/s", "slowest-fastest", "× first row", "CPU ms"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                row.reader,
                str(row.workers),
                row.decoder,
                f"{row.images_per_second:.0f}",
                f"{row.slowest:.0f}-{row.fastest:.0f}",
                f"{row.images_per_second / self.rows[0].images_per_second:.2f}",
                f"{row.cpu_ms:.2f}",
            )
        return table

    def save(self, directory: str | Path) -> Path:
        """Write `data.json` to a directory, made if need be."""
        path = Path(directory) / "data.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({**asdict(self), "verdict": self.verdict}, indent=2) + "\n", encoding="utf-8"
        )
        return path


def benchmark_data(
    root: str | Path | None = None,
    readers: Sequence[str] = tuple(READERS),
    workers: Sequence[int] = (0, 2),
    decoders: Sequence[str] = ("pillow", "torchvision"),
    images: int = 512,
    batch_size: int = 32,
    image_size: int = 224,
    rounds: int = 5,
    model: str | None = None,
    device: str = "cpu",
    workspace: str | Path | None = None,
    directory: str | Path | None = None,
) -> DataBenchmark:
    """Measure the training loader over the same images, stored and decoded in several ways.

    Every round makes one pass with each combination, in turn, so that what else the machine does
    meets them all. A pass of each goes before, which starts the workers; the files then come from
    the system's cache, unless memory is short.

    Args:
        root: folder with ``train/<class>/*``, of which ``images`` are copied; None for copies of
            two photographs (CC BY, 640 × 427) that come with scikit-learn.
        readers: "folder" (a file an image), "tar" (a tar a split), "shards" (`mobileone shards`).
        workers: numbers of processes beside this one.
        decoders: "pillow" and "torchvision".
        images: how many, at most.
        batch_size: images a batch.
        image_size: side of the crops, in pixels.
        rounds: timed passes of each combination.
        model: time a training step of this timm model too, and say what binds a run.
        device: "cpu" or "cuda", for that step.
        workspace: folder for the copies, on the disk to be measured; None for the temporary one.
        directory: where to save the measurements as JSON; None: nowhere.

    Raises:
        FileNotFoundError: no images under ``root``.
        ValueError: a name or a number is out of range.
    """
    _check(readers, decoders, images, batch_size, image_size, rounds)
    if model is not None:
        check_model_name(model)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: this machine has no CUDA device. Use cpu.")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=workspace)))
        files = _copy(None if root is None else Path(root).expanduser(), place / "folder", images)
        _store(place, readers)
        combinations = list(product(readers, workers, decoders))
        loaders = []
        for reader, count, decoder in combinations:
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
            loaders.append(_decode_by(decoder, data.train_dataloader()))
        costs = _time_in_turn([_one_pass(loader) for loader in loaders], rounds)
        size = sum(file.stat().st_size for file in files) / len(files)
        del loaders  # whose workers end before their files do
    rows = []
    for combination, passes in zip(combinations, costs, strict=True):
        speeds = [len(files) / wall for wall, _ in passes]
        cpu = statistics.median(cpu for _, cpu in passes) / len(files) * 1e3
        rows.append(
            Throughput(*combination, statistics.median(speeds), min(speeds), max(speeds), cpu)
        )
    result = DataBenchmark(
        tuple(rows),
        len(files),
        size,
        batch_size,
        image_size,
        rounds,
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        str(torch.__version__),
        model,
        None if model is None else _step_speed(model, batch_size, image_size, rounds, device),
        device,
    )
    if directory is not None:
        result.save(directory)
    return result


def _check(
    readers: Sequence[str],
    decoders: Sequence[str],
    images: int,
    batch_size: int,
    image_size: int,
    rounds: int,
) -> None:
    for kind, names, known in (("reader", readers, READERS), ("decoder", decoders, DECODERS)):
        for name in names:
            if name not in known:
                raise ValueError(f"{kind} {name!r} is unknown. There are {', '.join(known)}.")
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


def _decode_by(decoder: str, loader: DataLoader) -> DataLoader:
    """The loader, before its first pass, with another decoder."""
    samples = loader.dataset
    assert isinstance(samples, ImageClassificationDataset)
    if decoder != "pillow":
        samples.decode = DECODERS[decoder]
        samples.transform = PhasedTransform([(0, accept_tensors(samples.transform.at(0)))])
    return loader


def _one_pass(loader: DataLoader) -> Callable[[], None]:
    def run() -> None:
        for _ in loader:
            pass

    return run


def _time_in_turn(
    actions: Sequence[Callable[[], None]], rounds: int
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
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    targets = torch.arange(batch_size, device=device) % 2

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), targets).backward()
        optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    (costs,) = _time_in_turn([step], rounds)
    return batch_size / statistics.median(wall for wall, _ in costs)
