"""Exports in a worker process: training does not wait, and nothing there stops it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.artifacts.callback import ReparameterizeOnSave
from callbacks.artifacts.folder import CheckpointFolder
from callbacks.signals import ForceQuit, Interrupted
from mobileone.export import Manifest, load_torchscript_artifact, worker

_SPEC = importlib.util.spec_from_file_location(
    "reparameterize_tests", Path(__file__).with_name("test_callback.py")
)
tests = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tests)

pytestmark = tests.pytestmark


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def make(folder):
    return lambda **options: ReparameterizeOnSave(
        **{"dirpath": str(folder), "formats": ["torchscript"], **options}
    )


@pytest.fixture
def started(monkeypatch):
    """The process ids of all workers; each test ends with none alive and none a zombie."""
    pids, real = [], worker.subprocess.Popen

    class Recorded(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pids.append(self.pid)

    monkeypatch.setattr(worker.subprocess, "Popen", Recorded)
    yield pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def replace_worker(monkeypatch, code):
    """Start a process that runs `code` in place of the worker; its folder is `sys.argv[1]`."""
    real = worker.subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", code, command[-1]], **options)

    monkeypatch.setattr(worker.subprocess, "Popen", popen)


def test_both_validations_are_published_and_training_is_the_same(make, tmp_path, folder, started):
    heard, callback = [], make()
    callback.listeners.append(lambda path, manifest: heard.append(path.name))
    torch.manual_seed(0)
    module = tests.Classifier([0.9, 0.1])
    tests.fit(module, callback, tmp_path, max_epochs=2)
    assert tests.contents(folder) == tests.expected(0, 1)
    assert heard == [tests.name(0), tests.name(1)]
    assert len(started) >= 2
    assert callback.last_error is None
    manifest = Manifest.load(folder / "best")
    manifest.verify(folder / "best")
    assert manifest.images == "given"
    tests.assert_artifact_is_of(folder / f"{tests.name(1)}.ckpt")
    torch.manual_seed(0)
    without = tests.Classifier()
    tests.fit(without, None, tmp_path, max_epochs=2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), without.state_dict().values(), strict=True)
    )


def test_the_worker_sees_no_gpu_and_a_killed_one_is_reported(
    make, tmp_path, folder, started, monkeypatch
):
    code = (
        "import os, sys, torch; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), "
        "torch.cuda.is_available(), torch.cuda.is_initialized(), flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    replace_worker(monkeypatch, code)
    callback = make()
    with pytest.warns(UserWarning, match=r"worker died \(exit status -9\): ...'' False False"):
        trainer = tests.fit(tests.Classifier([0.5]), callback, tmp_path)
    assert trainer.global_step == tests.STEPS
    assert "worker died" in callback.last_error
    assert tests.contents(folder) == {
        "last.ckpt",
        "best.ckpt",
        f"{tests.name(0)}.ckpt",
        f"{tests.name(0)}.export-error.json",
    }


def test_a_hanging_worker_is_stopped(make, tmp_path, folder, started, monkeypatch):
    replace_worker(monkeypatch, "import time; time.sleep(1000)")
    with pytest.warns(UserWarning, match=r"stopped: it took more than 0\.5 s"):
        tests.fit(tests.Classifier([0.5]), make(timeout=0.5), tmp_path)
    assert not list(folder.glob(".tmp*"))


def test_a_hanging_worker_is_stopped_while_training_goes_on(
    make, tmp_path, folder, started, monkeypatch
):
    """Not only at the next validation, which may be hours away."""
    seen, callback = [], make(timeout=0.3)

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1:
                time.sleep(0.3)
                seen.append(callback.last_error)

    replace_worker(monkeypatch, "import time; time.sleep(1000)")
    with pytest.warns(UserWarning, match=r"stopped: it took more than 0\.3 s"):
        tests.fit(tests.Classifier(), callback, tmp_path, max_epochs=2, callbacks=[Look()])
    assert "stopped" in seen[-1]


def test_an_error_in_the_worker_has_its_traceback_and_strict_raises(
    make, tmp_path, folder, started, monkeypatch
):
    code = (
        "import json, sys, pathlib; (pathlib.Path(sys.argv[1]) / 'result.json').write_text("
        "json.dumps({'status': 'failed', 'reason': 'ValueError: no such operator', "
        "'details': 'Traceback, somewhere'}))"
    )
    replace_worker(monkeypatch, code)
    with pytest.raises(RuntimeError, match=r"000004 failed: ValueError: no such operator"):
        tests.fit(tests.Classifier([0.5]), make(strict=True), tmp_path)
    record = json.loads((folder / f"{tests.name(0)}.export-error.json").read_text())
    assert "somewhere" in record["error"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exporting")
def test_an_export_that_was_missed_is_made_up_for(make, tmp_path, folder, started, monkeypatch):
    with monkeypatch.context() as patched:
        replace_worker(patched, "raise SystemExit(3)")
        tests.fit(tests.Classifier([0.9]), make(), tmp_path)
    resume = str(folder / "last.ckpt")
    tests.fit(tests.Classifier([0.1]), make(), tmp_path, max_epochs=2, resume=resume)
    assert tests.contents(folder) == tests.expected(0, 1)
    assert tests.targets(folder)["best"] == tests.name(0)


def test_an_exception_in_training_lets_the_export_end(make, tmp_path, folder, started):
    class Fails(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tests.fit(tests.Classifier([0.5]), make(), tmp_path, max_epochs=2, callbacks=[Fails()])
    assert tests.contents(folder) == tests.expected(0)


@pytest.mark.parametrize("stop", [ForceQuit, Interrupted])
def test_ctrl_c_ends_an_export_that_would_take_minutes(
    make, tmp_path, folder, started, monkeypatch, stop
):
    """At once, or while the run waits for it."""

    class Stops(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                clock.append(time.monotonic())
                if stop is Interrupted:
                    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
                raise stop

    replace_worker(monkeypatch, "import time; time.sleep(100)")
    before, clock = signal.getsignal(signal.SIGINT), []
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit):
        warnings.simplefilter("always")
        tests.fit(tests.Classifier([0.5]), make(), tmp_path, max_epochs=2, callbacks=[Stops()])
    signal.signal(signal.SIGINT, before)  # Lightning ignores further Ctrl-C after ForceQuit
    assert time.monotonic() - clock[0] < 50
    assert (folder / f"{tests.name(0)}.ckpt").is_file()
    assert not any("Training goes on" in str(warning.message) for warning in caught)


@pytest.mark.slow
def test_training_goes_on_while_the_worker_works(make, tmp_path, folder, started, monkeypatch):
    """The links move during the next epoch, at the first batch after the worker's end."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                if batch_idx == tests.STEPS - 1:
                    trainer.callbacks[-1]._publisher.exports._worker._process.wait()
                seen.append((folder / "last").exists())

        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                seen.append((folder / "last").exists())

    tests.fit(tests.Classifier([0.5]), make(), tmp_path, max_epochs=2, callbacks=[Look()])
    assert seen == [False] * tests.STEPS + [True]


def test_two_runs_do_not_write_to_one_folder(make, tmp_path, folder):
    class Second(Callback):
        def on_train_start(self, trainer, pl_module):
            with pytest.raises(RuntimeError, match="another run writes to"):
                tests.fit(tests.Classifier(), make(), tmp_path, callbacks=[Never()])

    class Never(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise AssertionError("it is refused before a checkpoint is restored")

    tests.fit(tests.Classifier(), make(background=False), tmp_path, callbacks=[Second()])
    assert tests.contents(folder) == tests.expected(0)
    load_torchscript_artifact(folder / "last")


ORPHAN = """
import os, sys, time
from pathlib import Path
from torch import nn
from mobileone.export import ExportJob
from mobileone.export.worker import ExportWorker
folder = Path(sys.argv[1]); place = folder / ".tmp-job"; place.mkdir(parents=True)
task = ExportJob(folder / "a.ckpt", folder / "out", ("torchscript",), network=nn.Flatten())
job = ExportWorker(task, place, 100)
child = os.fork()  # as a loader's process, which keeps what it inherits
if child:
    print(job.pid, child, flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_takes_its_worker_with_it(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    pid, child = map(int, parent.stdout.readline().split())
    os.kill(pid, signal.SIGSTOP)  # so that it cannot end by itself before the parent is gone
    parent.kill()
    parent.wait()
    parent.stdout.close()
    os.kill(pid, signal.SIGCONT)
    try:
        for _ in range(300):
            if not _alive(pid):
                return
            time.sleep(0.1)
        pytest.fail("the worker lives on")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_disk_that_fills_up_with_the_job_leaves_no_half_of_it(tmp_path, folder, monkeypatch):
    def full(task, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker.torch, "save", full)
    place = folder / ".tmp-job"
    place.mkdir(parents=True)
    with pytest.raises(OSError, match="No space"):
        worker.ExportWorker(None, place, 1)
    assert list(folder.iterdir()) == []


def test_a_worker_has_no_role_in_the_group(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    environment = worker._environment()
    assert "LOCAL_RANK" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_record_that_was_cut_short_by_a_kill_is_never_seen(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.record_error(tmp_path / "a.ckpt", "failed", "old", {})

    def half(self, text, encoding):
        self.write_bytes(text.encode(encoding)[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        folder.record_error(tmp_path / "a.ckpt", "failed", "new", {"val/acc1": 1.0})
    monkeypatch.undo()
    assert folder.missed_metrics(tmp_path / "a.ckpt") == {}
    assert [p.name for p in tmp_path.iterdir()] == ["a.export-error.json"]


def _alive(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False


KILLS = """
import subprocess
from types import SimpleNamespace
from mobileone.export import worker
start, work, victim, stride = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
WATCHED = {"os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "open"}
role = "trainer"

class Forked:
    # in place of Popen: the worker without the seconds that a new interpreter takes
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
            here.time.sleep(0.005)
        return self.returncode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

names = ("DEVNULL", "STDOUT", "TimeoutExpired")
worker.subprocess = SimpleNamespace(
    Popen=Forked, **{name: getattr(subprocess, name) for name in names}
)

def train(folder, kill_at):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if role == victim and event in WATCHED and str(folder) in str(arguments):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if kill_at:
        sys.addaudithook(hook)
    callback = here.ReparameterizeOnSave(dirpath=str(folder), formats=["torchscript"])
    module, resume = here.tests.Classifier([0.6, 0.1]), str(folder / "last.ckpt")
    here.tests.fit(module, callback, folder, max_epochs=4, resume=resume)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # no child is left, a zombie neither
        return callback.last_error
    raise AssertionError("a worker was not waited for")

def child(folder, kill_at=None):
    # the status, once every process that it started has ended
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

kills = resumed = 0
while True:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work, symlinks=True)
    status = child(work, 1 + stride * kills)
    for name in ("last", "best"):
        here.torch.load(work / f"{name}.ckpt", weights_only=True)
        here.Manifest.load(work / name).verify(work / name)
        here.load_torchscript_artifact(work / name)
    if status == 0:
        break
    if victim == "trainer":
        assert os.WIFSIGNALED(status), status
    else:  # training went on, said so, and left nothing behind
        assert os.waitstatus_to_exitcode(status) == 7, status
        assert here.torch.load(work / "last.ckpt", weights_only=True)["epoch"] == 3
        assert not list(work.glob(".tmp*"))
    if kills % 5 == 0 and here.torch.load(work / "last.ckpt", weights_only=True)["epoch"] < 3:
        resumed += 1
        assert child(work) == 0
        assert not list(work.glob(".tmp*"))
        assert here.tests.targets(work)["last"] == here.tests.name(3)
    kills += 1
print("kills", kills, resumed)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("victim", "stride"), [("trainer", 4), ("worker", 1)])
def test_a_kill_of_either_process_leaves_usable_files(make, tmp_path, folder, victim, stride):
    """Before every file operation of the worker, and before every fourth of the trainer."""
    tests.fit(tests.Classifier([0.5, 0.4]), make(background=False), tmp_path, max_epochs=2)
    script = tmp_path / "kills.py"
    arguments = (folder, tmp_path / "work", victim, stride)
    out = tests.run_script(script, KILLS, *arguments, module=__file__)
    kills, resumed = map(int, out.split("kills")[1].split())
    assert kills > 10
    assert resumed > 0 or victim == "worker"
