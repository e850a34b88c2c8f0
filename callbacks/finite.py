"""Whether a checkpoint holds numbers that training can go on with."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["not_finite_in", "not_finite_in_file"]

# other parts may hold infinity by right: the score of a best checkpoint that is still to come
_PARTS = ("state_dict", "current_model_state", "optimizer_states")


def not_finite_in(checkpoint: Mapping[str, Any]) -> str | None:
    """The name of the first weight, statistic or momentum that is NaN or infinite, or None."""
    for part in _PARTS:
        for name, tensor in _tensors(checkpoint.get(part), part):
            if not bool(tensor.isfinite().all()) and not _is_mask(tensor):
                return name
    return None


def not_finite_in_file(path: Path) -> str | None:
    """The same of a file that this process has just written; None if Lightning's way is not its."""
    if not path.is_file():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a plugin may write what it likes
        return None
    return not_finite_in(checkpoint) if isinstance(checkpoint, Mapping) else None


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from _tensors(inner, f"{name}/{key}")


def _is_mask(tensor: Tensor) -> bool:
    """Attention masks are 0 and minus infinity."""
    return not tensor.is_complex() and bool((tensor.isneginf() | (tensor == 0)).all())
