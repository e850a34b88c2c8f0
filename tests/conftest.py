"""Fixtures that every test may use."""

import os

# as the command does: on shared cores waiting threads that spin stall whoever has work, and these
# tests start other processes; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)
