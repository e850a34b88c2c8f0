"""Training steps in many settings within minutes, the most informative first."""

import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mobileone.bench.results import Result, Row
from mobileone.bench.timing import check_device
from mobileone.bench.training_step.implementations import IMPLEMENTATIONS, check_implementation
from mobileone.bench.training_step.measure import quartile_distance
from mobileone.bench.training_step.worker import (
    Precision,
    StepWorker,
    StepWorkerError,
    TrainingSetting,
)

__all__ = ["SUITES", "Suite", "measure_suite"]

_log = logging.getLogger(__name__)

_STEPS = (3, 10)  # at least, and at most where they take longer together than:
_SECONDS = 1.5


@dataclass(frozen=True)
class Suite:
    """Settings to measure in all combinations, the most informative of each kind first.

    Attributes:
        models: MobileOnes, by timm's names.
        batch_sizes: Images a step.
        precisions: See `Precision`.
        image_size: Height and width in pixels.
    """

    models: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    precisions: tuple[Precision, ...]
    image_size: int


_PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32", "tf32", "float16")
SUITES = {
    "gpu": Suite(tuple(f"mobileone_s{i}" for i in range(5)), (256, 32), _PRECISIONS, 224),
    # to try that everything runs, on any machine
    "smoke": Suite(("mobileone_s0",), (4, 2), _PRECISIONS, 32),
}

# how much later than the rest of its setting a contender comes: compiling takes a minute
_LATER = {
    **dict.fromkeys(("timm", "ours", "ours always", "plain"), 0),
    **dict.fromkeys(("timm graphs", "ours graphs", "ours always graphs", "plain graphs"), 0),
    **dict.fromkeys(("timm compiled", "ours always compiled", "plain compiled"), 2),
    **dict.fromkeys(("ours compiled", "timm reduce-overhead", "ours always reduce-overhead"), 3),
}


class _Cell(NamedTuple):
    model: str
    contender: str
    setting: TrainingSetting

    @property
    def alone(self) -> bool:
        """Whether it needs a process that nothing else was compiled in."""
        return IMPLEMENTATIONS[self.contender][1] is not None


def measure_suite(
    suite: str,
    device: str | None = None,
    contenders: Sequence[str] = tuple(_LATER),
    budget: float = 600.0,
    output: str | None = None,
) -> Result:
    """Measure training steps in all settings of a suite, until the time is over.

    The network that most want to know about comes first: the first model, in bfloat16, at large
    batches, in eager mode and as CUDA graphs; then what differs from that in more and more.
    Networks that are compiled get a process of their own. The result is written after
    each measurement.

    Args:
        suite: "gpu", S0 to S4 at 256 and 32 images of 224 px; "smoke", S0 at a toy size.
        device: "cpu" or "cuda"; null: "cuda" for the suite gpu, else "cpu".
        contenders: Implementations, by their names in `IMPLEMENTATIONS`; those of CUDA graphs are
            left out on a CPU.
        budget: Seconds for all.
        output: Folder for `suite.json` and `suite.csv`; null: print only.

    Returns:
        A result of the kind `suite`; rows have `model`, `batch_size`, `precision`, `layout`,
        `contender`, `seconds` (median of a step), `spread_seconds`, `to_plain` and `timm_to` (its
        time divided by the best of the plain net's in that setting, in whatever way and layout,
        and the best of timm's divided by its own), `kept_mib` and `peak_mib` (for an image; not
        where memory is a CUDA graph's), `failure`. The protocol's `left` counts what there was no
        time for.

    Raises:
        ValueError: A name or a number is out of range, or there is no such device.
    """
    if suite not in SUITES:
        raise ValueError(f"`suite` (={suite!r}) must be one of {', '.join(SUITES)}")
    if budget <= 0:
        raise ValueError(f"`budget` (={budget}) must be above 0 seconds")
    device = device or ("cuda" if suite == "gpu" else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"`device` (={device!r}) must be cpu or cuda: memory is known there only")
    for contender in contenders:
        check_implementation(contender, SUITES[suite].models[0])
    check_device(device)
    end = time.monotonic() + budget
    cells = _cells(SUITES[suite], contenders, device)
    how = {"suite": suite, "threads": torch.get_num_threads(), "budget_seconds": budget}
    result = Result.new("suite", how | {"left": len(cells)}, [], device)
    worker: StepWorker | None = None
    used = False  # whether the process had a network compiled in it, or may be broken
    try:
        for i, cell in enumerate(cells):
            if time.monotonic() >= end:
                break
            if worker is not None and (used or cell.alone):
                worker.close()
                worker = None
            worker = worker or StepWorker(*cell)
            worker.limit = max(end - time.monotonic(), 0.0)
            row = _measure(worker, cell)
            failure = row["failure"]
            broken = failure is not None and not failure.startswith("OutOfMemory")
            used = cell.alone or broken
            _log.info("%d of %d: %s", i + 1, len(cells), row)
            left = len(cells) - i - 1
            note = f"not measured, as the time was over: {left} of {len(cells)}" if left else ""
            rows = _compared([*result.rows, row])
            result = replace(result, protocol=how | {"left": left, "note": note}, rows=rows)
            if output is not None:
                result.save_all(output)
    finally:
        if worker is not None:
            worker.close()
    return result


def _cells(suite: Suite, contenders: Sequence[str], device: str) -> list[_Cell]:
    """All measurements, by in how much they differ from the first setting."""
    ranked: list[tuple[int, _Cell]] = []
    for model in suite.models:
        for precision in suite.precisions:
            for batch_size in suite.batch_sizes:
                rank = 2 * (model != suite.models[0]) + 2 * (precision != suite.precisions[0])
                rank += batch_size != suite.batch_sizes[0]
                for contender in contenders:
                    if device == "cpu" and contender.endswith(" graphs"):
                        continue
                    for channels_last in (True, False):  # as the recipe trains on CUDA, and not
                        if not channels_last and contender not in ("timm", "ours always", "plain"):
                            continue
                        setting = TrainingSetting(
                            batch_size, suite.image_size, torch.get_num_threads(), device,
                            channels_last, precision, "noise",
                        )  # fmt: skip
                        later = _LATER.get(contender, 3) + (not channels_last)
                        ranked.append((rank + later, _Cell(model, contender, setting)))
    return [cell for _, cell in sorted(ranked, key=lambda pair: (pair[0], pair[1].alone))]


def _measure(worker: StepWorker, cell: _Cell) -> Row:
    setting = cell.setting
    row: Row = {
        "model": cell.model,
        "batch_size": setting.batch_size,
        "precision": setting.precision,
        "layout": "channels-last" if setting.channels_last else "planes",
        "contender": cell.contender,
        "failure": None,
    }
    try:
        worker.prepare(*cell)
        times: list[float] = []
        least, most = _STEPS
        while len(times) < least or (len(times) < most and sum(times) < _SECONDS):
            times.append(worker.step().seconds)
        row |= {
            "seconds": statistics.median(times),
            "spread_seconds": quartile_distance(times),
            **worker.memory(),
        }
    except StepWorkerError as error:
        row["failure"] = str(error)
    return row


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The rows, with times relative to the best of timm's and of the plain net's so far."""
    best: dict[tuple[str, ...], float] = {}
    for row in rows:
        key = _network(row)
        best[key] = min(row.get("seconds", math.inf), best.get(key, math.inf))
    compared = []
    for row in rows:
        timm, plain = (best.get(_network(row, who), math.inf) for who in ("timm", "plain"))
        own = row.get("seconds")
        ratios = {
            "timm_to": timm / own if own and timm < math.inf else None,
            "to_plain": own / plain if own and plain < math.inf else None,
        }
        compared.append(row | ratios)
    return compared


def _network(row: Row, contender: str | None = None) -> tuple[str, ...]:
    """What is trained and in which setting, in whatever layout and way."""
    network = (contender or row["contender"]).split()[0]
    return row["model"], row["batch_size"], row["precision"], network
