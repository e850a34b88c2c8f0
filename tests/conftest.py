"""Fixtures that every test may use."""

import os
import sys

# as the command does: on shared cores waiting threads that spin stall whoever has work, and these
# tests start other processes; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from mobileone.io import user_modules


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n 2` keeps a file in one process, which makes what its tests share once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # else files of few tests, which may be long, are last
    return LoadFileScheduling(config, log) if config.option.dist == "load" else None


def pytest_collection_modifyitems(items):
    """Begin with the longest, so that it is not what all wait for at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache folder of all tests and processes, where the digits are written once."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILEONE_CACHE", str(folder / "cache"))
        yield folder / "cache"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_user_modules(monkeypatch) -> None:
    """What a test imports by `--imports`, and the folder that it is in, ends with the test."""
    monkeypatch.setattr(user_modules, "_imported", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
