"""An artifact to read."""

import shutil

import pytest

from mobileone.export import export_model
from tests.helpers.tiny import tiny_network, tiny_spec


@pytest.fixture(scope="session")
def _written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "artifact"
    return folder, export_model(tiny_network(), tiny_spec(), folder, ["torchscript"])


@pytest.fixture
def exported(_written, tmp_path):
    """The tiny network, its artifact as TorchScript in a folder of the test, and the manifest."""
    folder, manifest = _written
    return tiny_network(), shutil.copytree(folder, tmp_path / "artifact"), manifest
