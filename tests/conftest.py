"""Fixtures that every test may use."""

import os
from collections.abc import Callable

# as the command does: on shared cores waiting threads that spin stall whoever has work, and these
# tests start other processes; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Give a model's BatchNorms statistics and affine terms as training leaves them.

    On fresh ones a folding that drops the running mean or the affine terms would still pass.
    """

    def apply(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        return model

    return apply
