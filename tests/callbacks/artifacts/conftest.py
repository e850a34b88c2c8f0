"""Where the tests of the artifacts save."""

import pytest


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"
