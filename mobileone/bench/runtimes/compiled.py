"""torch.compile, whole network, default mode."""

import types
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from mobileone.bench.inference.timing import Run
from mobileone.bench.runtimes.eager import complete

__all__ = ["load"]

_number = count()


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Read the module that `eager.convert` wrote, and compile it.

    A network that cannot be compiled whole is an error, not a network in pieces.
    """
    model = torch.load(path, weights_only=False).to(x.device)  # our own file

    def forward(x: Tensor) -> Tensor:
        return model(x)

    # PyTorch keeps what it compiled by code object, and all conditions under which one may be
    # used are tried at each call: contenders that share the code would slow each other down
    code = forward.__code__.replace(co_name=f"forward_{next(_number)}")
    own = types.FunctionType(code, forward.__globals__, closure=forward.__closure__)
    return complete(torch.compile(own, fullgraph=True, dynamic=False), x)
