"""How many images a second the training loader delivers, by its number of workers."""

import statistics
import timeit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import timm
import torch

from lightning_modules.data.datamodule import ImageDataModule
from mobileone.bench.results import Result, Row
from mobileone.bench.timing import check_device
from mobileone.bench.training_step.worker import training_step

__all__ = ["benchmark_data"]


def benchmark_data(
    root: str | None = None,
    dataset: str = "",
    num_workers: Sequence[int] = (0, 2),
    batch_size: int = 32,
    input_size: int = 224,
    batches: int = 16,
    rounds: int = 5,
    model: str | None = None,
    device: str = "cpu",
) -> Result:
    """Measure the training loader of a data set, as `mobileone fit` reads it.

    Each number of workers delivers ``batches`` that do not count, which start the workers, and then
    as many in each round. From the second pass on, files come from the system's cache.

    Args:
        root: as `--data.root`.
        dataset: as `--data.dataset`: empty for folders, tar, digits, torch/cifar10 ….
        num_workers: numbers of processes in addition to this one.
        batch_size: images a batch.
        input_size: side of the crops, in pixels.
        batches: of a round.
        rounds: how many.
        model: time a training step of this timm model too, and report what limits a run.
        device: "cpu" or "cuda", for that step.

    Returns:
        A result of the kind `data`; rows have `reader` (the data set), `workers`, `images_per_s`
        (median over the rounds), `slowest_images_per_s` and `fastest_images_per_s`. The protocol
        has `model_images_per_s` of the training step: forward, backward, SGD; None without a model.

    Raises:
        FileNotFoundError: no images under ``root``.
        ValueError: a name or a number is out of range.
    """
    if min(batches, rounds) < 1:
        raise ValueError(f"batches={batches} and rounds={rounds} must be at least 1.")
    check_device(device)
    rows = []
    for count in num_workers:
        data = ImageDataModule(
            root,
            dataset,
            model or "mobileone_s0",
            input_size=input_size,
            batch_size=batch_size,
            num_workers=count,
            seed=0,
        )
        data.setup("fit")
        stream = chain.from_iterable(repeat(data.train_dataloader()))  # epochs without end
        speeds = _images_a_second(partial(_skip, stream, batches), batches * batch_size, rounds)
        rows.append(
            {
                "reader": dataset or "folder",
                "workers": count,
                "images_per_s": statistics.median(speeds),
                "slowest_images_per_s": min(speeds),
                "fastest_images_per_s": max(speeds),
            }
        )
    how = {
        "batch_size": batch_size,
        "image_size": input_size,
        "batches": batches,
        "rounds": rounds,
        "statistic": "images_per_s",
        "model": model,
        "model_images_per_s": None,
        "device": device,
    }
    if model is not None:
        images = torch.randn(batch_size, 3, input_size, input_size).to(device)
        take_step = training_step(timm.create_model(model).to(device).train(), images)

        def step() -> None:
            take_step()
            if images.is_cuda:
                torch.cuda.synchronize()

        speeds = _images_a_second(step, batch_size, rounds)
        how["model_images_per_s"] = statistics.median(speeds)
    how["note"] = _verdict(how, rows)
    return Result.new("data", how, rows, device)


def _verdict(how: Row, rows: Sequence[Row]) -> str:
    """Whether data or computation limits a run, in a sentence."""
    best = max(rows, key=lambda row: row["images_per_s"])
    speed, step = best["images_per_s"], how["model_images_per_s"]
    data = f"{best['workers']} workers give {speed:.0f} images/s"
    if step is None:
        return f"{data}; give --model for what training needs"
    return (
        f"bound by {'data' if speed < step else 'compute'}: {data}, and a training step of "
        f"{how['model']} on {how['device']} takes {step:.0f} images/s"
    )


def _skip(stream: Iterator[Any], count: int) -> None:
    deque(islice(stream, count), maxlen=0)


def _images_a_second(action: Callable[[], Any], images: int, rounds: int) -> list[float]:
    """The speed of an action on so many images in each round, after one that does not count."""
    _, *seconds = timeit.repeat(action, repeat=1 + rounds, number=1)
    return [images / each for each in seconds]
