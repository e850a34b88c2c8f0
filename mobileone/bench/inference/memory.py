"""Peak memory of inference, each case in a process of its own."""

import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from mobileone.bench.inference.case import BenchmarkCase, Setting, prepare
from mobileone.bench.results import Result, Row
from mobileone.bench.runtimes import RUNTIMES, check_runtimes, runtimes_for
from mobileone.bench.suites import build_model, choose_models
from mobileone.bench.timing import torch_threads
from mobileone.bench.training_step.worker import peak_bytes
from mobileone.io.user_modules import import_user_modules, imported_user_modules

__all__ = ["measure_memory"]

_RUNS = 3
_MIB = 2.0**20


def measure_memory(
    models: Sequence[str],
    runtimes: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1,),
    threads: int = 1,
    input_size: int | None = None,
    device: str = "cpu",
    suite: str | None = None,
) -> Result:
    """Measure what a process needs more to load a fused network and to run it.

    The file is written by this process and loaded by a fresh one, which has imported the runtime
    beforehand: neither the conversion nor the libraries count. On the CPU the operating system
    reports the peak of the memory that the process really occupied; on CUDA PyTorch's allocator.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        runtimes: Names in `RUNTIMES`; None: all that are present and do not compile in the
            process that runs.
        batch_sizes: Images in an inference.
        threads: Threads of the runtime.
        input_size: Height and width; None: what each model is meant for.
        device: Device of PyTorch.
        suite: A group of models, in addition: `paper` (Table 9) or `2026`.

    Returns:
        A result of the kind `memory`; rows have `model`, `runtime`, `batch_size`, `weights_mib`
        (the parameters alone), `peak_mib` (most while loading and running), `running_mib` (most
        while running, once loaded), and for `eager` `tensors_mib`, the most bytes of intermediate
        tensors that were alive together, which no allocator rounds.

    Raises:
        ValueError: A name or number is out of range, there is no such device, or the memory of a
            runtime cannot be separated from its compiler's.
        ImportError: A runtime was named that is not installed; says how to install it.
    """
    names, choice = choose_models(models, suite)
    if not batch_sizes:
        raise ValueError(f"`batch_sizes` (={batch_sizes!r}) must be a list of one or more")
    settings = [Setting(threads, batch, input_size, device) for batch in batch_sizes]
    chosen = _check_own_memory(runtimes, device)
    rows: list[Row] = []
    with torch_threads(threads):
        for name in names:
            for setting in settings:
                with tempfile.TemporaryDirectory() as folder:
                    build = partial(build_model, name)
                    cases = prepare(name, build, chosen, Path(folder) / "models", setting)
                    rows += [_measured(case) for case in cases]
    how = {"process": "fresh", "runs": _RUNS, "threads": threads, "device": device,
           "batch_sizes": list(batch_sizes), "image_size": input_size,
           "statistic": "peak_mib", "form": "fused, BatchNorm folded"}  # fmt: skip
    return Result.new("memory", how | choice, rows, device)


def _check_own_memory(runtimes: Sequence[str] | None, device: str) -> tuple[str, ...]:
    if runtimes is None:
        return tuple(name for name in runtimes_for(device) if RUNTIMES[name].own_memory)
    chosen = check_runtimes(runtimes, device)
    for name in chosen:
        if not RUNTIMES[name].own_memory:
            raise ValueError(
                f"`runtimes`: {name!r} compiles in the process that runs, whose memory is then "
                "the compiler's; leave it out"
            )
    return chosen


def _measured(case: BenchmarkCase) -> Row:
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters())
    row = case.row | {"weights_mib": weights / _MIB}
    if case.load is None:
        return row
    if row["runtime"] == "eager":
        row["tensors_mib"] = peak_bytes(case.load(), row["device"]) / _MIB
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        shape, modules = tuple(case.x.shape), imported_user_modules()
        peak, running = process.submit(_probe, row, case.path, shape, modules).result()
    return row | {"peak_mib": peak / _MIB, "running_mib": running / _MIB}


def _probe(
    row: Row, path: Path, shape: tuple[int, ...], modules: tuple[str, ...]
) -> tuple[int, int]:
    """In the fresh process: bytes at the peak of loading and running, and of running alone."""
    import_user_modules(modules)  # which may have registered the runtime
    runtime, device, threads = RUNTIMES[row["runtime"]], row["device"], row["threads"]
    torch.set_num_threads(threads)
    for package in runtime.packages:
        import_module(package)
    x = torch.randn(shape).to(device)
    torch.nn.Conv2d(shape[1], 8, 3).to(device)(x[:1, :, :8, :8])  # libraries set themselves up
    gc.collect()
    _forget_peak(device)
    before = _peak(device)
    run = runtime.load(path, x, threads)
    for _ in range(_RUNS):
        run()
    most = _peak(device)
    _forget_peak(device)
    for _ in range(_RUNS):
        run()
    return most - before, _peak(device) - before


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
