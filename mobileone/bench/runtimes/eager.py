"""PyTorch as it is, operation by operation."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.bench.inference.timing import Run

__all__ = ["complete", "convert", "load"]


def convert(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write the module."""
    torch.save(model, path)


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Read the module; the threads are PyTorch's own, set by the caller."""
    model = torch.load(path, weights_only=False).to(x.device)  # our own file, written a moment ago
    return complete(model, x)


def complete(model: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    """One inference that returns when its output exists, on whatever device."""
    wait = torch.get_device_module(x.device).synchronize if x.device.type != "cpu" else None

    def run() -> Tensor:
        with torch.inference_mode():
            output = model(x)
        if wait is not None:
            wait()
        return output

    run()
    return run
