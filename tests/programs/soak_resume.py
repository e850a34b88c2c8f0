"""Kill a training at random moments and restart it with the same command, until it is done.

    python -m tests.programs.soak_resume --kills 50

Each finished training must have the weights, raw and averaged, the momenta and the schedules of one
that was never killed, bit for bit, and whole artifacts. Prints where each kill fell.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

import callbacks.artifacts.publisher
import callbacks.checkpointing
import callbacks.snapshots
import mobileone.export.checkpoint
from callbacks.artifacts.folder import CheckpointFolder
from callbacks.curriculum import Curriculum
from lightning_modules.cli.main import main
from lightning_modules.recipe.classifier import ImageClassifier
from mobileone.export import Manifest
from tests.helpers.bitwise import differing

# the model's dropout, the augmentation and the curriculum would each betray a wrong place
COMMAND = """
fit --resume auto --run.root {root} --run.name {name} --model.model test_byobnet
--model.model_kwargs {{"drop_rate":0.3}} --model.lr 0.01 --data.dataset digits --data.batch_size 8
--data.input_size 48 --data.num_workers {workers} --data.auto_augment rand-m9-mstd0.5
--curriculum.phases [[0,32,0.3],[1,40,0.7],[2,48,1]] --curriculum.epochs 3 --ema.decay 0.9
--snapshots.every_n_steps 3 --checkpoint.formats [torchscript] --checkpoint.background {background}
--trainer.max_epochs 3 --trainer.limit_train_batches 10 --trainer.limit_val_batches 2
--trainer.val_check_interval 5 --trainer.accelerator cpu --trainer.enable_progress_bar false
--trainer.num_sanity_val_steps 0 --wandb.mode disabled --report.samples 0
"""
PLACES = {
    "step": (ImageClassifier, "training_step"),
    "validation": (ImageClassifier, "validation_step"),
    "checkpoint": (callbacks.checkpointing, "save_complete"),
    "snapshot": (callbacks.snapshots, "save_complete"),
    "artifact": (mobileone.export.checkpoint, "export_model"),
    "worker": (callbacks.artifacts.publisher, "ExportWorker"),  # of an export in background
    "links": (CheckpointFolder, "move_link"),
    "switch": (Curriculum, "on_train_batch_start"),
    "anywhere": None,
}


def kill_soon(seconds: float) -> None:
    """End this process within `seconds`, as the system's out-of-memory killer would."""
    delay = random.uniform(0, seconds)
    if delay < seconds / 10:
        os.kill(os.getpid(), signal.SIGKILL)
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def lay_mine(place: str) -> None:
    """Let this process be killed at one of its next visits to a place."""
    if PLACES[place] is None:
        kill_soon(3.0)
        return
    owner, name = PLACES[place]
    real, visits = getattr(owner, name), [random.randint(1, 4)]

    def mined(*args, **kwargs):
        if place != "switch" or (args[-1] == 0 and args[1].current_epoch > 0):
            visits[0] -= 1 if place != "switch" else visits[0]
            if visits[0] == 0:
                kill_soon(4.0 if place == "worker" else 0.03)  # that one runs next to training
        return real(*args, **kwargs)

    setattr(owner, name, mined)


def attempt(command: list[str], log: Path, place: str | None, seed: int) -> int:
    """Run the command in a forked process; returns its exit status, negative for a signal."""
    pid = os.fork()  # imports are done, so a restart costs no seconds
    if pid == 0:
        status = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            random.seed(seed)
            if place is not None:
                lay_mine(place)
            main(command)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(root: Path, name: str) -> dict:
    """The end of a finished training: its last checkpoint; its artifacts are checked."""
    (run,) = [p for p in (root / name).iterdir() if not p.is_symlink()]
    for link in ("last", "best"):
        folder = run / "checkpoints" / link
        Manifest.load(folder).verify(folder)
    assert not list(run.rglob(".tmp-*")), list(run.rglob(".tmp-*"))
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def soak(kills: int, seed: int, root: Path, workers: int = 0, background: bool = False) -> Counter:
    """Kill `kills` times; returns how often in each place. Raises if a training ends otherwise."""
    log, draw, fell, trainings = root / "log.txt", random.Random(seed), Counter(), 0

    def command(name: str) -> list[str]:
        asked = str(background).lower()
        return COMMAND.format(root=root, name=name, workers=workers, background=asked).split()

    places = [place for place in PLACES if place != ("artifact" if background else "worker")]

    assert attempt(command("whole"), log, None, 0) == 0, log.read_text()[-3000:]
    expected = result(root, "whole")
    while True:
        name = f"killed-{trainings}"
        place = draw.choice(places) if fell.total() < kills else None
        started = time.monotonic()
        status = attempt(command(name), log, place, draw.randrange(2**31))
        if status == -signal.SIGKILL:
            fell[place] += 1
            print(
                f"{fell.total():3}  {place}, after {time.monotonic() - started:.1f} s", flush=True
            )
            continue
        assert status == 0, log.read_text()[-3000:]
        wrong = differing(result(root, name), expected)
        assert not wrong, f"after {fell.total()} kills training {trainings} differs in {wrong[:9]}"
        trainings += 1
        print(f"training {trainings} ended with the weights of the one never killed", flush=True)
        shutil.rmtree(root / name)
        if fell.total() >= kills:
            print(f"{kills} kills, {trainings} trainings, all bit-identical: {dict(fell)}")
            return fell


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="data workers of the training")
    parser.add_argument("--background", action="store_true", help="export in worker processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(options.kills, options.seed, Path(folder), options.workers, options.background)
