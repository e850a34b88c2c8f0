"""Kill a training of two processes under torchrun at random moments, and start it again.

    python -m tests.programs.soak_torchrun --kills 6

A kill takes all processes at once, as a machine that fails, or one rank alone: then torchrun must
end the other by itself. The last training must have the weights, raw and averaged, the momenta and
the schedules of one that was never killed, bit for bit. Linux only: it looks into /proc.
"""

import argparse
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.bitwise import differing
from tests.programs.soak_resume import COMMAND, result

TORCHRUN = """
-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0
-m mobileone {fit} --trainer.devices 2 --trainer.strategy ddp
"""
EPOCH = 10  # steps
BEGUN = "All distributed processes registered"
VICTIMS = ("all", "all", "rank 0", "rank 1")


class Attempt:
    """One start of the command, and all processes that come of it."""

    def __init__(self, root: Path, name: str) -> None:
        self.mark = f"SOAK={secrets.token_hex(8)}"
        self.log = root / f"{name}.log"
        self._before = self.log.stat().st_size if self.log.exists() else 0
        repository = str(Path(__file__).parents[2])
        key, value = self.mark.split("=")
        fit = COMMAND.format(root=root, name=name, workers=1, background="true")
        path = {"PYTHONPATH": repository, "OMP_NUM_THREADS": "1", key: value}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *TORCHRUN.format(fit=fit).split()],
                env={**os.environ, **path},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        """What this start has printed."""
        return self.log.read_bytes()[self._before :].decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until it has printed a text."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end and self.process.poll() is None, self.said()[-3000:]
            time.sleep(0.05)

    def members(self, *wanted: str) -> list[int]:
        """Processes with this start's mark, and others, in their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                running = ") Z" not in (folder / "stat").read_text()
            except OSError:  # has ended meanwhile, or is another user's
                continue
            if running and {self.mark, *wanted} <= {*environment}:
                found.append(int(folder.name))
        return found

    def kill(self, victim: str) -> None:
        """Kill all processes, or the training process of one rank."""
        if victim != "all":
            (pid, *_) = sorted(self.members(f"RANK={victim[-1]}"))  # its workers came later
            os.kill(pid, signal.SIGKILL)
            return
        while found := self.members():  # one may have started another
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def end(self, seconds: float = 120) -> int:
        """Wait until nothing is left of it; its exit status."""
        end = time.monotonic() + seconds
        try:
            status = self.process.wait(seconds)
            while left := self.members():
                assert time.monotonic() < end, f"processes {left} are left"
                time.sleep(0.1)
        except BaseException:
            self.kill("all")
            raise
        return status


def newest_step(root: Path, name: str) -> int:
    """The step of the newest snapshot or checkpoint; 0 without one."""
    files = [p for p in (root / name).glob("2*/*/*.ckpt") if not p.is_symlink()]
    return max((int(re.findall(r"step=(\d+)", p.name)[0]) for p in files), default=0)


def soak(kills: int, seed: int, root: Path) -> None:
    """Kill `kills` times, then let it end. Raises if anything differs from a run without kills."""
    draw = random.Random(seed)
    within = 0
    whole = Attempt(root, "whole")
    whole.wait_for(BEGUN)
    begun = time.monotonic()
    assert whole.end() == 0, whole.said()[-3000:]
    duration = time.monotonic() - begun
    for number in range(kills):
        victim = VICTIMS[(number + seed) % len(VICTIMS)]
        attempt = Attempt(root, "killed")
        attempt.wait_for(BEGUN)
        before = newest_step(root, "killed")
        if number == 0 or draw.random() < 0.5:  # early in an epoch, once something of it is saved
            while (step := newest_step(root, "killed")) == before or step % EPOCH not in (3, 4, 5):
                if attempt.process.poll() is not None:
                    break
                time.sleep(0.01)
        else:
            time.sleep(draw.uniform(0.2, 0.8) * duration / (1 + kills / 2))
        if attempt.process.poll() is not None:
            break  # it was done before its turn came
        attempt.kill(victim)
        status = attempt.end()
        assert status != 0
        if victim != "all":
            assert "exitcode: -9" in attempt.said(), attempt.said()[-3000:]
        saved = newest_step(root, "killed")
        within += saved % EPOCH > 0
        print(f"{number + 1:3}  {victim}, step {saved} is saved", flush=True)
    last = Attempt(root, "killed")
    assert last.end(240) == 0, last.said()[-3000:]
    wrong = differing(result(root, "killed"), result(root, "whole"))
    assert not wrong, f"differs in {wrong[:9]}"
    print(f"ended with the weights of the one never killed, {within} times resumed in an epoch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(options.kills, options.seed, Path(folder))
