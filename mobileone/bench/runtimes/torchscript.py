"""TorchScript: traced, frozen."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.bench.inference.timing import Run
from mobileone.bench.runtimes.eager import complete

__all__ = ["convert", "load"]

_PROFILED = 3  # the executor observes the first calls and optimizes after them


def convert(model: nn.Module, x: Tensor, path: Path) -> None:
    """Trace, freeze and write."""
    with warnings.catch_warnings():
        _ignore_deprecation()
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # shapes are fixed
        traced = torch.jit.trace(model, x.cpu(), check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), path)


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Read, and run until the executor has optimized."""
    with warnings.catch_warnings():
        _ignore_deprecation()
        run = complete(torch.jit.load(path, map_location=x.device), x)
    for _ in range(_PROFILED):
        run()
    return run


def _ignore_deprecation() -> None:
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
