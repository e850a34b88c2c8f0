"""Fixtures that every test may use."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)
