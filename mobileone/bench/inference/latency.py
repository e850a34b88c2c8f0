"""Latency and throughput of fused networks across runtimes, cases in alternation."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mobileone.bench.inference.case import Setting, prepare
from mobileone.bench.results import Result, Row
from mobileone.bench.runtimes import check_runtimes, missing_runtimes
from mobileone.bench.suites import build_model, choose_models
from mobileone.bench.timing import get_protocol, pinned, summarize, time_in_turn, torch_threads

__all__ = ["measure_latency", "measure_throughput"]

_log = logging.getLogger(__name__)


def measure_latency(
    models: Sequence[str] | Mapping[str, Callable[[], nn.Module]],
    runtimes: Sequence[str] | None = None,
    protocol: str = "paper",
    runs: int | None = None,
    threads: int = 1,
    batch_size: int = 1,
    input_size: int | None = None,
    device: str = "cpu",
    suite: str | None = None,
) -> Result:
    """Time inferences of networks in their inference form.

    Every network is fused, its BatchNorms folded, the fold verified; every runtime's output is
    compared with PyTorch's before anything is timed. A network that a runtime cannot take, or
    computes wrongly, is in the result with the reason instead of times.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`; in Python
            also what builds each network, by its name in the result.
        runtimes: Names in `RUNTIMES`; None: all that are present.
        protocol: `paper` (1 warm-up, 1000 runs, minimum) or `modelbench` (20 rounds of 50, model
            reloaded, 10 lowest and 10 highest of each dropped, average).
        runs: Timed inferences of each case; None: the protocol's.
        threads: Threads, and processors that they are kept on.
        batch_size: Images in an inference.
        input_size: Height and width; None: what each model is meant for.
        device: Device of PyTorch.
        suite: A group of models, in addition: `paper` (Table 9) or `2026`.

    Returns:
        A result of the kind `latency`; rows have `model`, `runtime`, `min_ms`, `median_ms`,
        `p90_ms`, `mean_ms`, `max_ms`, `timed`, `threads`, `batch_size`, `image_size`, `device`,
        `precision`, `relative_error`, `branches_left`, `norms_left`, `prepare_s`, `failure`.

    Raises:
        ValueError: A name or number is out of range, or there is no such device.
        ImportError: A runtime was named that is not installed; says how to install it.
    """
    choice: dict[str, Any] = {}
    if not isinstance(models, Mapping):
        chosen_names, choice = choose_models(models, suite)
        models = {name: partial(build_model, name) for name in chosen_names}
    chosen = get_protocol(protocol, runs)
    setting = Setting(threads, batch_size, input_size, device)
    names = check_runtimes(runtimes, device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        cases = []
        for i, (name, build) in enumerate(models.items()):
            _log.info("%s (%d of %d): convert for %s", name, i + 1, len(models), ", ".join(names))
            cases += prepare(name, build, names, Path(folder) / str(i), setting)
        ready = {str(i): c.load for i, c in enumerate(cases) if c.load is not None}
        _log.info("time %d cases, %d runs of each", len(ready), chosen.runs)
        with pinned(threads) as processors:
            times = time_in_turn(ready, chosen)
    rows = [
        case.row | (summarize(times[str(i)]) if str(i) in times else {})
        for i, case in enumerate(cases)
    ]
    how = asdict(chosen) | choice | asdict(setting)
    how |= {
        "processors": processors,
        "form": "fused, BatchNorm folded",
        "order": "in turns, shuffled",
        "runtimes_missing": missing_runtimes() if runtimes is None else {},
    }
    return Result.new("latency", how, rows, device)


def measure_throughput(
    models: Sequence[str],
    batch_sizes: Sequence[int] = (1, 8, 32),
    runtimes: Sequence[str] | None = ("eager",),
    runs: int = 40,
    threads: int = 1,
    input_size: int | None = None,
    device: str = "cpu",
    suite: str | None = None,
) -> Result:
    """Time batches, as `measure_latency` times single images, and divide.

    Cases of the same batch size alternate. A batch that does not fit into memory is in the result
    with that reason.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        batch_sizes: Images in an inference.
        runtimes: Names in `RUNTIMES`; None: all that are present.
        runs: Timed inferences of each case and batch size.
        threads: Threads, and processors that they are kept on.
        input_size: Height and width; None: what each model is meant for.
        device: Device of PyTorch.
        suite: A group of models, in addition: `paper` (Table 9) or `2026`.

    Returns:
        A result of the kind `throughput`; rows are those of `measure_latency` with
        `images_per_s`, from the median time, and `best_images_per_s`, from the shortest.

    Raises:
        ValueError: A name or number is out of range, or there is no such device.
        ImportError: A runtime was named that is not installed; says how to install it.
    """
    names, choice = choose_models(models, suite)
    if not batch_sizes:
        raise ValueError(f"`batch_sizes` (={batch_sizes!r}) must be a list of one or more")
    for batch in batch_sizes:  # all are checked before the first is measured
        Setting(threads, batch, input_size, device)
    check_runtimes(runtimes, device)
    results = [
        measure_latency(names, runtimes, "paper", runs, threads, batch, input_size, device)
        for batch in batch_sizes
    ]
    how = results[0].protocol | choice | {"statistic": "images_per_s"}
    how |= {"batch_size": None, "batch_sizes": list(batch_sizes)}
    rows = [_with_rate(row) for result in results for row in result.rows]
    return Result.new("throughput", how, rows, device)


def _with_rate(row: Row) -> Row:
    if row["failure"] is not None:
        return row
    images = 1e3 * row["batch_size"]
    return row | {
        "images_per_s": images / row["median_ms"],
        "best_images_per_s": images / row["min_ms"],
    }
