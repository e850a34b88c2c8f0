"""Other Python processes: programs of tests/programs, the command, two ranks of a torchrun."""

import os
import subprocess
import sys
import time

from tests.helpers.paths import PROGRAMS, REPOSITORY

__all__ = [
    "environment",
    "run_on_two_ranks",
    "run_program",
    "run_python",
    "start_python",
    "wait_for",
]


def environment(**variables):
    """This process's variables and others; the repository is importable, one thread a process."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def start_python(*arguments, variables=None, **options):
    """Start `python *arguments`, for example "-m", "mobileone"; returns the Popen."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(**variables or {}), text=True, **options)


def run_python(*arguments, variables=None, timeout=240, status=0, **options):
    """Run `python *arguments`; returns stdout and stderr. Fails at another exit status."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_program(name, *arguments, **options):
    """Run a file of tests/programs to its end, as `run_python` does."""
    return run_python(PROGRAMS / name, *arguments, **options)


def run_on_two_ranks(name, *arguments):
    """Run a file of tests/programs as both ranks of a torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run_python(*torchrun, PROGRAMS / name, *arguments, timeout=200)


def wait_for(condition, seconds=200):
    """Wait until `condition()` is true; fails after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
