"""Fixtures that every test may use."""

import os
import sys

# as the command does: on shared cores waiting threads that spin stall whoever has work, and these
# tests start other processes; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from mobileone.io import user_modules


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_user_modules(monkeypatch) -> None:
    """What a test imports by `--imports`, and the folder that it is in, ends with the test."""
    monkeypatch.setattr(user_modules, "_imported", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
