"""Several processes: killed together or one alone, the same command resumes; no start hangs."""

from pathlib import Path

import pytest

from tests.helpers.processes import run_program


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_kills_leave_no_trace_and_one_rank_does_not_outlive_the_other():
    """All processes at once, then rank 0 alone; the program makes more."""
    done = run_program("soak_torchrun.py", "--kills", 2, "--seed", 1, timeout=580)
    assert "1  all" in done.stdout and "2  rank 0" in done.stdout
    assert "0 times resumed in an epoch" not in done.stdout


@pytest.mark.slow
def test_starts_with_data_workers_do_not_hang():
    """Three; the program makes sixty."""
    done = run_program("soak_starts.py", "--starts", 3, "--seconds", 150, timeout=500)
    assert "3 starts without a hang" in done.stdout
