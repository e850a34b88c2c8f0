"""Does a written file have the operations of the fused network, and no branch besides?"""

import re
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_kinds", "fused_kinds", "structure_problems", "unfused_layers"]

_KINDS = {
    "convolutions": re.compile(r"^_?(depthwise_)?conv(olution|_?\dd)?$"),
    "norms": re.compile(r"batch_?norm", re.IGNORECASE),
    "additions": re.compile(r"^add_?$"),  # a sum is over the places of a map
}


def count_kinds(operations: Mapping[str, int]) -> dict[str, int]:
    """Convolutions, batch norms and additions among operations by any format's names."""
    totals = dict.fromkeys(_KINDS, 0)
    for name, count in operations.items():
        # aten.conv2d.default, aten::_convolution, CONV_2D -> conv2d, _convolution, conv_2d
        plain = name.lower().removeprefix("aten.").removeprefix("aten::").partition(".")[0]
        for kind, pattern in _KINDS.items():
            if pattern.search(plain):
                totals[kind] += count
    return totals


@torch.no_grad()
def fused_kinds(fused: nn.Module, images: Tensor) -> dict[str, int]:
    """The same counts for the operations that PyTorch runs in one pass of the fused network.

    Args:
        fused: the reparameterized network.
        images: normalized, (N, C, H, W).
    """
    with _Recorder() as recorder:
        fused(images)
    return count_kinds(recorder.operations)


def structure_problems(written: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """What a file has too much or too little of; converters may merge additions and norms."""
    problems = []
    if written["convolutions"] != expected["convolutions"]:
        problems.append(
            f"{written['convolutions']} convolutions where the fused network has "
            f"{expected['convolutions']}"
        )
    problems += [
        f"{written[kind]} {kind} where the fused network has {expected[kind]}"
        for kind in ("norms", "additions")
        if written[kind] > expected[kind]
    ]
    return problems


def unfused_layers(fused: nn.Module) -> list[str]:
    """The layers that still have their branches: those that timm could fuse and did not.

    timm replaces what has `fuse()` by another module, and calls `reparameterize()`, after which a
    layer has no BatchNorm of its own.
    """
    return [
        f"the layer {name!r} ({type(module).__name__}) is not fused"
        for name, module in fused.named_modules()
        if _is_unfused(module)
    ]


def _is_unfused(module: nn.Module) -> bool:
    if callable(getattr(module, "fuse", None)):
        trial = deepcopy(module)
        return trial.fuse() is not trial  # type: ignore[operator]
    norms = any(isinstance(part, _BatchNorm) for part in module.modules())
    return norms and callable(getattr(module, "reparameterize", None))


class _Recorder(TorchDispatchMode):
    """Counts the operations that reach PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))
