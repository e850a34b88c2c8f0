"""Start trainings of two processes with data workers, again and again: none may hang.

    python -m tests.programs.soak_starts --starts 60

Each start makes the processes of both ranks, their servers of data workers, and workers for the
training and the validation, while gloo's and BLAS's threads run; the training itself is short.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = """
-m mobileone fit --run.root {root} --model.model test_byobnet --model.lr 0.01
--data.dataset digits --data.batch_size 4 --data.input_size 32 --data.num_workers 2
--trainer.devices 2 --trainer.strategy ddp --trainer.accelerator cpu --trainer.fast_dev_run 3
--trainer.enable_progress_bar false --wandb.mode disabled
"""


def start(root: Path, seconds: float) -> float:
    """Train once; returns how long it took.

    Raises:
        AssertionError: it ended with an error, or took longer than `seconds`; says where it was.
    """
    begun = time.monotonic()
    repository = str(Path(__file__).parents[2])
    with (root / "log.txt").open("wb+") as log:
        process = subprocess.Popen(
            [sys.executable, *COMMAND.format(root=root / "runs").split()],
            env={**os.environ, "PYTHONPATH": repository, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"none after {seconds:g} s; {stacks(process.pid)}"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its session: whatever is left of it
            except ProcessLookupError:
                pass
        process.wait()
        log.seek(0)
        assert status == 0, f"exit status {status}\n{log.read().decode(errors='replace')[-3000:]}"
    return time.monotonic() - begun


def stacks(session: int) -> str:
    """What each process of a session waits for, as the system knows it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parts = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(parts[3]) == session:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                wait = (folder / "wchan").read_text()
                found.append(f"{folder.name} {parts[0]} in {wait}: {' '.join(words)[:80]}")
        except OSError:  # has ended meanwhile
            continue
    return "\n".join(found)


def soak(starts: int, seconds: float) -> None:
    """Start that often, and print the times."""
    times = []
    for number in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            times.append(start(Path(folder), seconds))
        print(f"{number + 1:3}  {times[-1]:.1f} s", flush=True)
    middle = statistics.median(times)
    print(f"{starts} starts without a hang: {min(times):.1f}, {middle:.1f}, {max(times):.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=180, help="after which a start hangs")
    options = parser.parse_args()
    soak(options.starts, options.seconds)
