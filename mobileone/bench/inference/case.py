"""A fused network in a runtime: built, folded, converted, and shown to compute the same."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.bench.inference.deploy_form import DeployForm, build_form, relative_error
from mobileone.bench.inference.timing import Run
from mobileone.bench.results import Row
from mobileone.bench.runtimes import RUNTIMES

__all__ = ["BenchmarkCase", "Setting", "prepare"]

_Files = dict[Callable[[nn.Module, Tensor, Path], None], Path]  # what each has written

_TOLERANCE = {"float32": 1e-3, "float16": 5e-2}  # as for artifacts: the order of sums; 11 bits


@dataclass(frozen=True)
class Setting:
    """What all contenders of a measurement have in common.

    Attributes:
        threads: Threads of the runtime.
        batch_size: Images in an inference.
        image_size: Height and width; None: what each model is meant for.
        device: Device of PyTorch.
    """

    threads: int = 1
    batch_size: int = 1
    image_size: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.image_size is not None and self.image_size < 1):
            raise ValueError(
                f"`batch_size` (={self.batch_size}) and `image_size` (={self.image_size}) must be "
                "at least 1"
            )


@dataclass(frozen=True)
class BenchmarkCase:
    """A network in a runtime.

    Attributes:
        row: What a result says of it before it is measured; `failure` is the reason why it
            cannot be, or None.
        model: The fused network, on the CPU.
        x: Its input, (N, C, H, W), on the device.
        path: What the runtime's `convert` wrote.
        load: Makes it ready to run, anew each time; None where it failed.
    """

    row: Row
    model: nn.Module
    x: Tensor
    path: Path
    load: Callable[[], Run] | None


def prepare(
    name: str,
    build: Callable[[], nn.Module],
    runtimes: Sequence[str],
    folder: Path,
    setting: Setting,
) -> list[BenchmarkCase]:
    """A network in each of several runtimes.

    Args:
        name: What the rows call it.
        build: Makes it, in eval mode.
        runtimes: Names in `RUNTIMES`.
        folder: Where the files go; is made.
        setting: The rest.
    """
    folder.mkdir()
    form, x = build_form(build(), setting.image_size, setting.batch_size)
    with torch.inference_mode():
        expected = form.model(x)
    row: Row = {
        "model": name,
        "runtime": "",
        "threads": setting.threads,
        "batch_size": setting.batch_size,
        "image_size": x.shape[2],
        "device": setting.device,
        "branches_left": len(form.branches_left),
        "norms_left": form.norms_left,
    }
    files: _Files = {}
    return [
        _in_runtime(row | {"runtime": runtime}, form, x, expected, folder, files)
        for runtime in runtimes
    ]


def _in_runtime(
    row: Row, form: DeployForm, x: Tensor, expected: Tensor, folder: Path, files: _Files
) -> BenchmarkCase:
    runtime = RUNTIMES[row["runtime"]]
    path = files.get(runtime.convert, folder / row["runtime"])
    row = row | {"precision": runtime.precision, "failure": None}
    placed = x.to(row["device"])
    started = time.perf_counter()

    checked: list[Run] = []  # is used first: compiling it a second time may take a minute

    def load() -> Run:
        return checked.pop() if checked else runtime.load(path, placed, row["threads"])

    try:
        if runtime.convert not in files:
            runtime.convert(form.model, x, path)
            files[runtime.convert] = path
        run = load()
        error = relative_error(_tensor(run()), expected)
        if not error < _TOLERANCE[runtime.precision]:
            raise RuntimeError(f"its output differs from PyTorch's by {error:.2g} (relative)")
    except Exception as failure:  # whatever a converter raises: the others are measured still
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        return BenchmarkCase(row | {"failure": reason}, form.model, placed, path, None)
    checked.append(run)
    row |= {"relative_error": error, "prepare_s": time.perf_counter() - started}
    return BenchmarkCase(row, form.model, placed, path, load)


def _tensor(output: Any) -> Tensor:
    return output.clone() if isinstance(output, Tensor) else torch.as_tensor(output).clone()
