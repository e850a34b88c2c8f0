"""timm's own model tests, from the source distribution of the installed timm, on this family."""

import os
import subprocess
import sys
import tarfile

import pytest
import timm

from tests.helpers.paths import REPOSITORY

HERE = REPOSITORY / "tests" / "helpers"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The tests that belong to the installed release; only the source distribution has them."""
    folder = tmp_path_factory.mktemp("timm")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm"]
    done = subprocess.run(
        [*pip, f"timm=={timm.__version__}", "-d", str(folder)], capture_output=True, text=True
    )
    archives = list(folder.glob("timm-*.tar.gz"))
    if not archives:
        reason = f"pip found no source distribution of timm {timm.__version__}: {done.stderr}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"timm-{timm.__version__}" / "tests"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_family_passes_timms_model_tests(suite):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("GITHUB_ACTIONS", None)  # timm leaves out tests where it is set
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-q", "-c", os.devnull, "--rootdir", str(suite), str(suite / "test_models.py")],
        cwd=suite,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1].lstrip("="))
    assert passed > 180, done.stdout[-2000:]  # the plugin selected what it is there to select
