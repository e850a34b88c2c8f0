"""Kill a training before its file operations, one after the other; what it leaves must be usable.

kill_artifacts.py START WORK VICTIM STRIDE: START is the folder of a training of two epochs, which
is continued in WORK. VICTIM: `alone` (the trainer, without a worker), `trainer` or `worker`.
Prints the number of kills and of resumed trainings.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from mobileone.export import Manifest, load_torchscript_artifact, worker
from tests.helpers.checkpoints import fit, name, saver, targets
from tests.helpers.modules import ScoredClassifier

WATCHED = {"os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "open"}
start, work, victim, stride = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
role = "alone" if victim == "alone" else "trainer"


class Forked:
    """In place of Popen: the worker without the seconds that a new interpreter takes."""

    def __init__(self, command, **options):
        global role
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            role = "worker"
            worker._main(int(command[-2]), Path(command[-1]), [])
            os._exit(0)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        while self.poll() is None:
            time.sleep(0.005)
        return self.returncode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


names = ("DEVNULL", "STDOUT", "TimeoutExpired")
constants = {name: getattr(subprocess, name) for name in names}
worker.subprocess = SimpleNamespace(Popen=Forked, **constants)


def train(folder, kill_at):
    """Train to the end of epoch 4; returns the last error of an export."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if role == victim and event in WATCHED and str(folder) in str(arguments):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(hook)
    callback = saver(folder, background=victim != "alone")
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.6, 0.1]), callback, folder, max_epochs=4, resume=resume)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # no child is left, a zombie neither
        return callback.last_error
    raise AssertionError("a worker was not waited for")


def child(folder, kill_at=None):
    """The status of such a training, once every process that it started has ended."""
    alive, ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            error = train(folder, kill_at)
            os._exit(7 if error else 0)
        except BaseException as error:
            print("FAILED", kill_at, repr(error), flush=True)
            os._exit(1)
    os.close(ends)
    status = os.waitpid(pid, 0)[1]
    os.read(alive, 1)
    os.close(alive)
    return status


def saved_epoch():
    return torch.load(work / "last.ckpt", weights_only=True)["epoch"]


kills = resumed = 0
while True:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work, symlinks=True)
    status = child(work, 1 + stride * kills)
    for link in ("last", "best"):
        torch.load(work / f"{link}.ckpt", weights_only=True)
        Manifest.load(work / link).verify(work / link)
        load_torchscript_artifact(work / link)
    if status == 0:
        break
    if victim == "worker":  # training continued, reported it, and left nothing behind
        assert os.waitstatus_to_exitcode(status) == 7, status
        assert saved_epoch() == 3
        assert not list(work.glob(".tmp*"))
    else:
        assert os.WIFSIGNALED(status), status
    if kills % 5 == 0 and saved_epoch() < 3:
        resumed += 1
        assert child(work) == 0
        assert not list(work.glob(".tmp*"))
        assert targets(work)["last"] == name(3)
    kills += 1
print("kills", kills, resumed)
