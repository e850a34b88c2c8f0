"""Exports in a worker process: training does not wait, and nothing there stops it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback

from callbacks.artifacts import publisher
from callbacks.artifacts.folder import CheckpointFolder
from callbacks.signals import ForceQuit, Interrupted
from mobileone.export import ExportJob, Manifest, load_torchscript_artifact, worker
from tests.helpers.checkpoints import (
    STEPS,
    assert_artifact_is_of,
    contents,
    expected,
    fit,
    name,
    saver,
    targets,
)
from tests.helpers.formats import skip_without_packages
from tests.helpers.modules import ScoredClassifier
from tests.helpers.paths import PROGRAMS
from tests.helpers.processes import run_program, start_python


@pytest.fixture
def make(folder):
    return lambda **options: saver(folder, **options)


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
    module = ScoredClassifier([0.9, 0.1])
    fit(module, callback, tmp_path, max_epochs=2)
    assert contents(folder) == expected(0, 1)
    assert heard == [name(0), name(1)]
    assert len(started) >= 2
    assert callback.last_error is None
    manifest = Manifest.load(folder / "best")
    manifest.verify(folder / "best")
    assert manifest.images == "given"
    assert_artifact_is_of(folder / f"{name(1)}.ckpt")
    torch.manual_seed(0)
    without = ScoredClassifier()
    fit(without, None, tmp_path, max_epochs=2)
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
        trainer = fit(ScoredClassifier([0.5]), callback, tmp_path)
    assert trainer.global_step == STEPS
    assert "worker died" in callback.last_error
    assert contents(folder) == {
        "last.ckpt",
        "best.ckpt",
        f"{name(0)}.ckpt",
        f"{name(0)}.export-error.json",
    }


def test_a_hanging_worker_is_stopped(make, tmp_path, folder, started, monkeypatch):
    replace_worker(monkeypatch, "import time; time.sleep(1000)")
    with pytest.warns(UserWarning, match=r"stopped: it took more than 0\.5 s"):
        fit(ScoredClassifier([0.5]), make(timeout=0.5), tmp_path)
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
        fit(ScoredClassifier(), callback, tmp_path, max_epochs=2, callbacks=[Look()])
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
        fit(ScoredClassifier([0.5]), make(strict=True), tmp_path)
    record = json.loads((folder / f"{name(0)}.export-error.json").read_text())
    assert "somewhere" in record["error"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exporting")
def test_an_export_that_was_missed_is_made_up_for(make, tmp_path, folder, started, monkeypatch):
    with monkeypatch.context() as patched:
        replace_worker(patched, "raise SystemExit(3)")
        fit(ScoredClassifier([0.9]), make(), tmp_path)
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.1]), make(), tmp_path, max_epochs=2, resume=resume)
    assert contents(folder) == expected(0, 1)
    assert targets(folder)["best"] == name(0)


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
        fit(ScoredClassifier([0.5]), make(), tmp_path, max_epochs=2, callbacks=[Stops()])
    signal.signal(signal.SIGINT, before)  # Lightning ignores further Ctrl-C after ForceQuit
    assert time.monotonic() - clock[0] < 50
    assert (folder / f"{name(0)}.ckpt").is_file()
    assert not any("Training continues" in str(warning.message) for warning in caught)


@pytest.mark.slow
def test_training_goes_on_while_the_worker_works(make, tmp_path, folder, started, monkeypatch):
    """The links move during the next epoch, at the first batch after the worker's end."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                if batch_idx == STEPS - 1:
                    trainer.callbacks[-1]._publisher.exports._worker._process.wait()
                seen.append((folder / "last").exists())

        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                seen.append((folder / "last").exists())

    fit(ScoredClassifier([0.5]), make(), tmp_path, max_epochs=2, callbacks=[Look()])
    assert seen == [False] * STEPS + [True]


class LargeClassifier(ScoredClassifier):
    """MobileOne-S0 that ships for 224 px; its head is trained, which takes no time."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model("mobileone_s0", num_classes=3)
        for module in self.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the statistics are those of one batch
        with torch.no_grad():
            self.model(torch.randn(4, 3, 128, 128))

    def training_step(self, batch):
        return self.model.get_classifier().weight.square().sum()

    @property
    def export_spec(self):
        return replace(super().export_spec, model_name="mobileone_s0", input_size=(3, 224, 224))


@pytest.mark.slow
def test_exports_for_devices_take_less_than_two_seconds_of_the_training(
    make, tmp_path, folder, started
):
    """At two validations: to save, to start a worker, and to take in what it has written."""
    formats, spent, worked = ["executorch", "litert", "coreai"], [], []
    for each in formats:
        skip_without_packages(each)
    callback = make(formats=formats)

    def timed(hook, *args):
        start = time.perf_counter()
        hook(*args)
        spent.append(time.perf_counter() - start)

    for hook in ("on_validation_end", "on_train_batch_end"):
        setattr(callback, hook, partial(timed, getattr(callback, hook)))

    class Wait(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:  # as an epoch that lasts longer than the export
                start = time.perf_counter()
                callback._publisher.exports._worker._process.wait()
                worked.append(time.perf_counter() - start)

    fit(LargeClassifier(), callback, tmp_path, max_epochs=2, callbacks=[Wait()])
    assert sum(spent) < 2 < worked[0], (spent, worked)
    assert {*Manifest.load(folder / "last").formats} == {*formats}


class SlowWorker:
    """Takes longer than an epoch: it exports when it is waited for."""

    def __init__(self, job, parent, timeout):
        self.job = job

    def running(self):
        return True

    def wait(self):
        return worker.run_job(self.job)

    def stop(self):
        pass


def test_an_exception_in_training_lets_the_export_end(make, tmp_path, folder, monkeypatch):
    def fail(trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(publisher, "ExportWorker", SlowWorker)
    fails = LambdaCallback(on_train_epoch_start=fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(ScoredClassifier([0.5]), make(), tmp_path, max_epochs=2, callbacks=[fails])
    assert contents(folder) == expected(0)


@pytest.mark.filterwarnings("ignore:Exporting")
@pytest.mark.parametrize(
    ("options", "scores", "failing", "checkpoints", "artifacts"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4], [], [0, 0, 1, 3], [None, 0, 1, 3]),
        ({"strict": True}, [0.1, 0.2, 0.3, 0.4], [], [0, 0, 1, 3], [None, 0, 1, 3]),
        ({"save_top_k": 3}, [0.1, 0.2, 0.3, 0.4], [], [0, 0, 1, 3], [None, 0, 1, 3]),
        # a failed one is left behind, as where exports are fast
        ({}, [0.1, 0.2, 0.3, 0.4], [1, 2], [0, 0, 1, 3], [None, 0, 0, 3]),
        # one that is tried again stays the best
        ({"save_top_k": 2}, [0.9, 0.1, 0.2, 0.1], [0], [0, 0, 0, 0], [None, None, 0, 0]),
    ],
)
def test_the_best_follows_where_each_export_ends_after_the_next_validation(
    make, tmp_path, folder, monkeypatch, options, scores, failing, checkpoints, artifacts
):
    """A kill in a later epoch must not leave the best of the first one."""
    left, real, seen = [name(epoch) for epoch in failing], worker.run_job, []

    def run(job):
        if job.directory.name in left:
            left.remove(job.directory.name)
            return worker.ExportResult.of(job, "failed", "no such operator")
        return real(job)

    def look():
        assert all(path.exists() for path in folder.iterdir())  # no link to what was removed
        seen.append(targets(folder))

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                look()

    monkeypatch.setattr(worker, "run_job", run)
    monkeypatch.setattr(publisher, "ExportWorker", SlowWorker)
    fit(ScoredClassifier(scores), make(**options), tmp_path, max_epochs=4, callbacks=[Look()])
    look()
    assert [found["best.ckpt"] for found in seen] == [f"{name(e)}.ckpt" for e in checkpoints]
    assert [found["last.ckpt"] for found in seen] == [f"{name(e)}.ckpt" for e in range(4)]
    assert [found.get("best") for found in seen] == [e if e is None else name(e) for e in artifacts]


def test_a_result_that_cannot_be_read_does_not_hold_up_the_next_export(folder, monkeypatch):
    class Unreadable(SlowWorker):
        def wait(self):
            if self.job.checkpoint.name == "a.ckpt":
                raise FileNotFoundError("no manifest.json")
            return worker.ExportResult(str(self.job.checkpoint), "published")

    monkeypatch.setattr(publisher, "ExportWorker", Unreadable)
    exports = publisher.ExportQueue(CheckpointFolder(folder), True, 9)
    for stem in ("a", "b"):
        exports.submit(ExportJob(folder / f"{stem}.ckpt", folder / stem, ("torchscript",)))
    ended = exports.drain()
    assert [result.status for result in ended] == ["failed", "published"]
    assert "FileNotFoundError: no manifest.json" in ended[0].reason
    assert contents(folder) == {"a.export-error.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["executorch", "litert", "coreai"])
def test_converters_print_nothing_to_the_terminal_of_a_training(name, tmp_path):
    """In processes of their own, where the packages are imported for the first time."""
    skip_without_packages(name)
    said = [
        run_program("train_with_formats.py", tmp_path / str(number), *arguments)
        for number, arguments in enumerate(
            [("false", "torchscript"), ("false", name), ("true", name)]
        )
    ]
    assert [run.stdout for run in said] == [said[0].stdout] * 3
    assert [_without_paths(run.stderr) for run in said] == [_without_paths(said[0].stderr)] * 3


def _without_paths(text):
    return re.sub(r"/\S+", "PATH", text)


def test_two_runs_do_not_write_to_one_folder(make, tmp_path, folder):
    def second(trainer, pl_module):
        with pytest.raises(RuntimeError, match="another run writes to"):
            fit(ScoredClassifier(), make(), tmp_path, callbacks=[never])

    def refused(trainer, pl_module):
        raise AssertionError("it is refused before a checkpoint is restored")

    never = LambdaCallback(on_fit_start=refused)
    started = LambdaCallback(on_train_start=second)
    fit(ScoredClassifier(), make(background=False), tmp_path, callbacks=[started])
    assert contents(folder) == expected(0)
    load_torchscript_artifact(folder / "last")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_takes_its_worker_with_it(tmp_path):
    program = PROGRAMS / "orphan_worker.py"
    parent = start_python(program, tmp_path, stdout=subprocess.PIPE)
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
    with pytest.raises(OSError, match="No space"):
        worker.ExportWorker(None, folder, 1)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_cleaned_does_not_end_the_training(folder, started, monkeypatch):
    """As where another machine changes a shared folder meanwhile."""
    tried = []

    def fails(parent):
        tried.append(parent)
        raise OSError(116, "Stale file handle")

    replace_worker(monkeypatch, "raise SystemExit(3)")
    monkeypatch.setattr(worker, "clean_stale", fails)
    job = ExportJob(folder / "a.ckpt", folder / "a", ("torchscript",))
    result = worker.ExportWorker(job, folder, 100).wait()
    assert "worker died (exit status 3)" in result.reason
    assert tried == [folder]
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    ("victim", "stride", "least"), [("alone", 1, 40), ("trainer", 4, 10), ("worker", 1, 10)]
)
def test_a_kill_leaves_usable_files(make, tmp_path, folder, victim, stride, least):
    """Before every file operation, and before every fourth of a trainer with a worker."""
    fit(ScoredClassifier([0.5, 0.4]), make(background=False), tmp_path, max_epochs=2)
    arguments = folder, tmp_path / "work", victim, stride
    out = run_program("kill_artifacts.py", *arguments, timeout=500).stdout
    kills, resumed = map(int, out.split("kills")[1].split())
    assert kills > least
    assert resumed > 0 or victim == "worker"
