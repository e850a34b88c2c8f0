"""Several processes under torchrun: killed together or one alone, the same command goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import PROGRAMS, REPOSITORY


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_kills_leave_no_trace_and_one_rank_does_not_outlive_the_other():
    """All processes at once, then rank 0 alone; the program makes more."""
    script = PROGRAMS / "soak_torchrun.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "2", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1  all" in done.stdout and "2  rank 0" in done.stdout
    assert "0 times resumed in an epoch" not in done.stdout
