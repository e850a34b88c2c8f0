"""The cost of a training step: our blocks, timm's, and the plain net, side by side."""

import logging
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import get_args

import torch

from mobileone.bench.results import Result, Row
from mobileone.bench.timing import check_device, check_threads
from mobileone.bench.training_step.implementations import (
    ImageKind,
    change_of,
    check_implementation,
)
from mobileone.bench.training_step.worker import (
    Precision,
    StepTime,
    StepWorker,
    StepWorkerError,
    TrainingSetting,
)

__all__ = ["measure_training", "quartile_distance"]

_log = logging.getLogger(__name__)

_CONTENDERS = (
    *("timm", "timm compiled", "ours", "ours always", "ours compiled", "plain", "plain compiled"),
)


def measure_training(
    models: Sequence[str] = ("mobileone_s0", "mobileone_s1"),
    contenders: Sequence[str] = _CONTENDERS,
    batch_size: int = 16,
    input_size: int = 224,
    rounds: int = 7,
    threads: int | None = None,
    device: str = "cpu",
    channels_last: bool = False,
    amp: bool = False,
    images: ImageKind = "photos",
) -> Result:
    """Measure training steps of several implementations, each in a process of its own, in turn.

    Every round runs one step of every implementation, in shuffled order, so that other load of the
    machine affects all of them. Processes that are not at work wait without using a processor. Two
    untimed steps of each come first, in which compilers run. One that fails is in the result with
    the reason instead of times.

    Args:
        models: MobileOnes, by timm's names.
        contenders: Implementations, by their names in `IMPLEMENTATIONS`.
        batch_size: Images a step.
        input_size: Height and width in pixels.
        rounds: Timed steps of each.
        threads: CPU threads; None: PyTorch's choice for this process.
        device: "cpu" or "cuda".
        channels_last: Memory format of models and images.
        amp: Run the forward pass under autocast in bfloat16.
        images: "photos", crops of two photographs, whose pixels are like their neighbors as in
            what networks train on, or "noise". Close statistics cost a collapsed stem some time.

    Returns:
        A result of the kind `training`; rows have `model`, `contender`, `seconds` (median of a
        step), `spread_seconds` (distance of the quartiles), `cpu_seconds` (median CPU time of all
        threads), `to_plain` (median over the rounds of its time divided by the plain net's),
        `timm_to` (of timm's block's divided by its own), `kept_mib` and `peak_mib` (memory for an
        image: kept by autograd, and most alive at a time), `change` (what the
        implementation needed to survive, see `change_of`), `failure`.

    Raises:
        ValueError: A name or a number is out of range, or there is no such device.
    """
    if min(batch_size, input_size, rounds) < 1:
        raise ValueError(
            f"`batch_size` (={batch_size}), `input_size` (={input_size}) and `rounds` (={rounds}) "
            "must be at least 1"
        )
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"`device` (={device!r}) must be cpu or cuda: memory is known there only")
    if images not in get_args(ImageKind):
        raise ValueError(f"`images` (={images!r}) must be one of {', '.join(get_args(ImageKind))}")
    check_device(device)
    threads = torch.get_num_threads() if threads is None else threads
    check_threads(threads)
    for model in models:
        for implementation in contenders:
            check_implementation(implementation, model)
    precision: Precision = "bfloat16" if amp else "default"
    setting = TrainingSetting(
        batch_size, input_size, threads, device, channels_last, precision, images
    )
    rows: list[Row] = []
    for model in models:
        rows += _measure_model(model, contenders, setting, rounds)
    how = asdict(setting) | {
        "amp": amp,
        "rounds": rounds,
        "statistic": "seconds",
        "process": "one a contender",
        "order": "in turns, shuffled",
    }
    return Result.new("training", how, rows, device)


def _measure_model(
    model: str, implementations: Sequence[str], setting: TrainingSetting, rounds: int
) -> list[Row]:
    failures: dict[str, str] = {}
    times: dict[str, list[StepTime]] = {name: [] for name in implementations}
    needs: dict[str, Row] = {}
    with ExitStack() as stack:
        at_work: dict[str, StepWorker] = {}

        @contextmanager
        def survived(name: str) -> Iterator[None]:
            """Record what ends an implementation, and continue without it."""
            try:
                yield
            except StepWorkerError as error:
                _log.info("%s, %s: %s", model, name, error)
                failures[name] = str(error)
                at_work.pop(name, None)

        for i, name in enumerate(implementations):
            _log.info("%s, %s (%d of %d): prepare", model, name, i + 1, len(implementations))
            worker = StepWorker(model, name, setting)
            stack.callback(worker.close)
            with survived(name):
                worker.prepare()
                at_work[name] = worker
        order = list(at_work)
        shuffle = random.Random(0).shuffle
        for turn in range(rounds):
            _log.info("%s: round %d of %d", model, turn + 1, rounds)
            shuffle(order)
            for name in [name for name in order if name in at_work]:
                with survived(name):
                    times[name].append(at_work[name].step())
        for name in list(at_work):
            with survived(name):
                needs[name] = at_work[name].memory()
    return [
        {"model": model, "contender": name}
        | ({} if name in failures else _statistics(name, times, failures) | needs[name])
        | {
            "change": change_of(name, setting.device, setting.channels_last),
            "failure": failures.get(name),
        }
        for name in implementations
    ]


def _statistics(
    name: str, times: dict[str, list[StepTime]], failures: dict[str, str]
) -> dict[str, float | None]:
    own = [step.seconds for step in times[name]]

    def ratio(other: str, inverse: bool = False) -> float | None:
        """Median over the rounds of our time divided by another's."""
        if other not in times or other in failures:
            return None
        pairs = zip(own, (step.seconds for step in times[other]), strict=True)
        return statistics.median(b / a if inverse else a / b for a, b in pairs)

    return {
        "seconds": statistics.median(own),
        "spread_seconds": quartile_distance(own),
        "cpu_seconds": statistics.median(step.cpu_seconds for step in times[name]),
        "to_plain": ratio("plain"),
        "timm_to": ratio("timm", inverse=True),
    }


def quartile_distance(values: list[float]) -> float:
    """Between the first and the third."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first
