"""TorchScript: the file of the `torchscript` format, frozen."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from mobileone.bench.inference.timing import Run
from mobileone.bench.runtimes.eager import complete
from mobileone.export.formats import torchscript

__all__ = ["load"]

_PROFILED = 3  # the executor observes the first calls and optimizes after them


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Read, freeze, and run until the executor has optimized."""
    module = torchscript.load(path.with_suffix(".pt")).to(x.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        run = complete(torch.jit.freeze(module), x)
    for _ in range(_PROFILED):
        run()
    return run
