"""Latency of fused networks across runtimes, contenders in alternation."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.bench.deploy_form import DeployForm, deploy_form, relative_error, settle_norms
from mobileone.bench.models import build_model, check_models, input_size_of
from mobileone.bench.results import Result, Row
from mobileone.bench.runtimes import RUNTIMES, check_runtimes, missing_runtimes
from mobileone.bench.threads import check_threads, pinned, torch_threads
from mobileone.bench.timing import Run, get_protocol, summarise, time_in_turn

__all__ = ["check_device", "measure_latency", "measure_modules"]

_SETTLING = 4  # images that BatchNorm's statistics are of
_TOLERANCE = {"float32": 1e-3, "float16": 5e-2}  # as for artifacts: the order of sums; 11 bits


def measure_latency(
    models: Sequence[str],
    runtimes: Sequence[str] | None = None,
    protocol: str = "paper",
    runs: int | None = None,
    threads: int = 1,
    batch_size: int = 1,
    image_size: int | None = None,
    device: str = "cpu",
) -> Result:
    """Time inferences of networks in their inference form.

    Every network is fused, its BatchNorms folded, the fold verified; every runtime's output is
    compared with PyTorch's before anything is timed. A network that a runtime cannot take, or
    computes wrongly, stands in the result with the reason instead of times.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        runtimes: Names in `RUNTIMES`; None: all that are present.
        protocol: `paper` (1 warm-up, 1000 runs, minimum) or `modelbench` (20 rounds of 50, model
            loaded anew, 10 lowest and 10 highest of each dropped, average).
        runs: Timed inferences of each contender; None: the protocol's.
        threads: Threads, and processors that they are kept on.
        batch_size: Images in an inference.
        image_size: Height and width; None: what each model is meant for.
        device: Device of PyTorch.

    Returns:
        A result of the kind `latency`; rows have `model`, `runtime`, `min_ms`, `median_ms`,
        `p90_ms`, `mean_ms`, `max_ms`, `timed`, `threads`, `batch_size`, `image_size`, `device`,
        `precision`, `relative_error`, `branches_left`, `norms_left`, `prepare_s`, `failure`.

    Raises:
        ValueError: A name or number is out of range, or there is no such device.
        ImportError: A runtime was named that is not installed; says how to install it.
    """
    names = check_models(models)
    modules = {name: (lambda name=name: build_model(name)) for name in names}
    return measure_modules(
        modules, runtimes, protocol, runs, threads, batch_size, image_size, device
    )


def measure_modules(
    modules: Mapping[str, Callable[[], nn.Module]],
    runtimes: Sequence[str] | None = None,
    protocol: str = "paper",
    runs: int | None = None,
    threads: int = 1,
    batch_size: int = 1,
    image_size: int | None = None,
    device: str = "cpu",
) -> Result:
    """The same as `measure_latency` for modules of one's own.

    Args:
        modules: What builds each network, by its name in the result.
        runtimes: See `measure_latency`, as for the rest.
        protocol: …
        runs: …
        threads: …
        batch_size: …
        image_size: …
        device: …
    """
    chosen = get_protocol(protocol, runs)
    check_device(device)
    check_threads(threads)
    if batch_size < 1 or (image_size is not None and image_size < 1):
        raise ValueError(
            f"`batch_size` (={batch_size}) and `image_size` (={image_size}) must be at least 1"
        )
    names = check_runtimes(runtimes, device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        contenders = [
            contender
            for i, (name, build) in enumerate(modules.items())
            for contender in _prepare(
                name, build, names, Path(folder) / str(i), threads, batch_size, image_size, device
            )
        ]
        ready = {str(i): c.load for i, c in enumerate(contenders) if c.load is not None}
        with pinned(threads) as processors:
            times = time_in_turn(ready, chosen)
    for i, contender in enumerate(contenders):
        if str(i) in times:
            contender.row.update(summarise(times[str(i)]))
    how = chosen.to_dict() | {
        "threads": threads,
        "processors": processors,
        "batch_size": batch_size,
        "image_size": image_size,
        "device": device,
        "form": "fused, BatchNorm folded",
        "order": "in turns, shuffled",
        "runtimes_missing": missing_runtimes() if runtimes is None else {},
    }
    return Result.new("latency", how, [contender.row for contender in contenders], device)


def check_device(device: str) -> None:
    """Make sure that PyTorch has a device.

    Raises:
        ValueError: It has not; names those that there are.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: not compiled with CUDA
        there = [d for d in ("cuda", "mps", "xpu") if torch.get_device_module(d).is_available()]
        raise ValueError(
            f"`device` (={device!r}) is not on this machine; there is {', '.join(['cpu', *there])}"
        ) from error


@dataclass(frozen=True)
class _Contender:
    """A network in a runtime: the beginning of its row, and what makes it ready to run."""

    row: Row
    load: Callable[[], Run] | None


def _prepare(
    name: str,
    build: Callable[[], nn.Module],
    runtimes: Sequence[str],
    folder: Path,
    threads: int,
    batch_size: int,
    image_size: int | None,
    device: str,
) -> list[_Contender]:
    folder.mkdir()
    model = build()
    channels, height, width = input_size_of(model, image_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settle_norms(model, torch.randn(_SETTLING, channels, height, width))
        x = torch.randn(batch_size, channels, height, width)
    form = deploy_form(model, x)
    with torch.inference_mode():
        expected = form.model(x)
    common: Row = {
        "model": name,
        "threads": threads,
        "batch_size": batch_size,
        "image_size": height,
        "device": device,
        "branches_left": len(form.branches_left),
        "norms_left": form.norms_left,
    }
    return [
        _in_runtime(common | {"runtime": runtime}, form, x, expected, folder / runtime, device)
        for runtime in runtimes
    ]


def _in_runtime(
    row: Row, form: DeployForm, x: Tensor, expected: Tensor, path: Path, device: str
) -> _Contender:
    runtime = RUNTIMES[row["runtime"]]
    row = row | {"precision": runtime.precision, "failure": None}
    started = time.perf_counter()
    placed = x.to(device)

    def load() -> Run:
        return runtime.load(path, placed, row["threads"])

    try:
        runtime.convert(form.model, x, path)
        error = relative_error(_tensor(load()()), expected)
        if not error < _TOLERANCE[runtime.precision]:
            raise RuntimeError(f"its output differs from PyTorch's by {error:.2g} (relative)")
    except Exception as failure:  # whatever a converter raises: the others are measured still
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        return _Contender(row | {"failure": reason}, None)
    row |= {"relative_error": error, "prepare_s": time.perf_counter() - started}
    return _Contender(row, load)


def _tensor(output: Any) -> Tensor:
    return output.clone() if isinstance(output, Tensor) else torch.as_tensor(output).clone()
