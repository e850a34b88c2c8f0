"""Snapshots within epochs, and what a run does when it is asked to stop."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

from callbacks.ema import EMA
from callbacks.snapshots import Snapshots, _remove_others
from tests.helpers import trainer as helpers
from tests.helpers.processes import run_program


class Resumable(DataLoader):
    """Twelve batches; continues where the checkpoint was made."""

    def __init__(self, module):
        self.module = module
        super().__init__(TensorDataset(torch.arange(24.0).view(24, 1) / 24), batch_size=2)

    def __iter__(self):
        loop = self.module.trainer.fit_loop
        start = loop.batch_idx + 1 if loop.is_resuming else 0
        return iter([batch for i, batch in enumerate(super().__iter__()) if i >= start])

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.validations = 0

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validations += 1

    def train_dataloader(self):
        return Resumable(self)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(3, 1)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Signals(Callback):
    """Sends this process a signal in some hook."""

    def __init__(self, hook, number, step, times=1):
        def send(trainer, *args, **kwargs):
            if trainer.global_step == step and self.left:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                self.left = 0

        self.left = 1
        setattr(self, hook, send)


def fit(folder, snapshots, *more, **options):
    module = Module()
    options = {"max_epochs": 2, "enable_checkpointing": True, **options}
    helpers.fit(folder, module, None, EMA(0.9), *more, snapshots, **options)
    return module


def steps(folder):
    return [int(p.stem.removeprefix("step=")) for p in sorted((folder / "snapshots").iterdir())]


def test_by_steps_but_not_between_a_step_and_its_validation(tmp_path):
    fit(tmp_path, Snapshots(every_n_steps=4, every_minutes=0, keep=99))
    # 11 and 23: the step before the last of an epoch, whose validation follows
    assert steps(tmp_path) == [4, 8, 11, 15, 19, 23]


def test_validation_within_epochs(tmp_path):
    fit(tmp_path, Snapshots(every_n_steps=3, every_minutes=0, keep=99), val_check_interval=6)
    assert steps(tmp_path) == [3, 5, 8, 11, 14, 17, 20, 23]


def test_the_newest_are_kept(tmp_path):
    fit(tmp_path, Snapshots(every_n_steps=2, every_minutes=0, keep=2))
    assert steps(tmp_path) == [21, 23]


def test_the_last_steps_are_kept_whatever_the_files_times_say(tmp_path):
    def age(trainer, *_):
        for path in (tmp_path / "snapshots").glob("*.ckpt"):
            os.utime(path, (2**33 - trainer.global_step,) * 2)

    aging = LambdaCallback(on_train_batch_end=age)
    fit(tmp_path, Snapshots(every_n_steps=2, every_minutes=0, keep=2), aging)
    assert steps(tmp_path) == [21, 23]


def test_snapshots_of_a_training_that_was_not_continued_go(tmp_path):
    for step in (4, 6, 8, 10):
        (tmp_path / f"step={step:08d}.ckpt").touch()
    _remove_others(tmp_path, step=8, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step=00000006.ckpt",
        "step=00000008.ckpt",
    ]


def test_by_time(tmp_path, monkeypatch):
    times = [0.0]
    tick = LambdaCallback(on_train_batch_start=lambda *_: times.append(times[-1] + 20))
    monkeypatch.setattr("callbacks.snapshots.time", SimpleNamespace(monotonic=lambda: times[-1]))
    fit(tmp_path, Snapshots(every_minutes=1.5, keep=99), tick)
    assert steps(tmp_path) == [5, 10, 11, 16, 21, 23]


def test_accumulated_gradients_are_not_cut(tmp_path):
    fit(tmp_path, Snapshots(every_n_steps=1, every_minutes=0, keep=99), accumulate_grad_batches=3)
    assert steps(tmp_path) == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_snapshot_leads_to_the_same_end(tmp_path, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    rule = {"every_n_steps": 1, "every_minutes": 0}
    whole = fit(tmp_path / "whole", Snapshots(**rule, keep=99), **options)
    files = sorted((tmp_path / "whole/snapshots").iterdir())
    assert len(files) == (22 if accumulate == 1 else 6)
    for path in files:
        rest = fit(tmp_path / path.stem, Snapshots(**rule), ckpt_path=str(path), **options)
        assert torch.equal(rest.layer.weight, whole.layer.weight)
        made = int(path.stem.removeprefix("step=")) * accumulate
        assert rest.validations == (6 if made < 12 else 3)  # none is left out


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, SIGTERMException), (signal.SIGINT, SystemExit)]
)
@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_before_zero_grad", 5, 6),  # in a step: ends after it
        ("on_train_batch_start", 11, 11),  # the validation follows: the step before
        ("on_validation_batch_start", 12, 11),
    ],
)
def test_a_signal_ends_the_run_with_a_snapshot(tmp_path, number, expected, hook, step, saved):
    before = signal.getsignal(number)
    whole = fit(tmp_path / "whole", Snapshots())
    with pytest.raises(expected):
        fit(tmp_path / "cut", Snapshots(every_minutes=0), Signals(hook, number, step))
    assert steps(tmp_path / "cut")[-1] == saved
    path = tmp_path / f"cut/snapshots/step={saved:08d}.ckpt"
    rest = fit(tmp_path / "cut", Snapshots(), ckpt_path=str(path))
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    assert signal.getsignal(number) in (before, signal.SIG_IGN)
    signal.signal(number, before)  # Lightning ignores further Ctrl-C after one


def test_a_second_interrupt_stops_at_once(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(tmp_path, Snapshots(), Signals("on_before_zero_grad", signal.SIGINT, 5, times=2))
    assert not (tmp_path / "snapshots").exists()
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    signal.signal(signal.SIGINT, before)


def test_a_forked_process_neither_speaks_nor_stops(tmp_path, capfd):
    """The terminal sends Ctrl-C to a loader's workers too."""

    class Forks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                child = os.fork()
                if child == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    fit(tmp_path, Snapshots(every_minutes=0), Forks())
    assert "stopping after" not in capfd.readouterr().err


def test_a_preempted_slurm_job_is_queued_again(tmp_path, monkeypatch):
    """SLURM's signal in a step: a snapshot, `scontrol requeue`, no checkpoint of Lightning's."""
    log = tmp_path / "requeued"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" > {log}\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = "NTASKS=1 NTASKS_PER_NODE=1 JOB_ID=4711 JOB_NAME=train NODELIST=localhost"
    for word in f"{job} LOCALID=0 PROCID=0 NODEID=0".split():
        monkeypatch.setenv("SLURM_" + word.split("=")[0], word.split("=")[1])
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SIGTERMException):
        preempt = Signals("on_before_zero_grad", signal.SIGUSR1, 5)
        fit(tmp_path / "run", Snapshots(), preempt, devices=1, num_nodes=1)
    assert log.read_text().split() == ["requeue", "4711"]
    assert steps(tmp_path / "run") == [6]
    assert not list(Path(tmp_path / "run").rglob("hpc_ckpt*"))
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_full_disk_is_said_and_training_goes_on(tmp_path, monkeypatch):
    real = Trainer.save_checkpoint

    def full(self, path, *args, **kwargs):
        if "00000008" in str(path):
            raise OSError(28, "No space left on device")
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.warns(UserWarning, match=r"no snapshot at step 8: .*No space left.* MB are free"):
        fit(tmp_path, Snapshots(every_n_steps=4, every_minutes=0, keep=99))
    assert steps(tmp_path) == [4, 11, 15, 19, 23]


@pytest.mark.parametrize("spoilt", ["weight", "momentum"])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, spoilt):
    def diverge(trainer, pl_module, *args):
        if trainer.global_step == 6:
            weight = pl_module.layer.weight
            momentum = trainer.optimizers[0].state[weight]["momentum_buffer"]
            (weight if spoilt == "weight" else momentum).data.fill_(torch.inf)

    spoil = LambdaCallback(on_train_batch_end=diverge)
    with pytest.raises(FloatingPointError, match=rf"step=00000006.*{spoilt}.* not finite after s"):
        fit(tmp_path, Snapshots(every_n_steps=2, every_minutes=0, keep=1), spoil)
    assert steps(tmp_path) == [4]


def test_a_snapshot_that_leads_to_no_finite_loss_is_set_aside(tmp_path):
    """Its weights may be finite, and too large."""

    def refuse(trainer, *args):
        if trainer.global_step == 6:
            raise FloatingPointError("the loss is nan")

    with (
        pytest.warns(UserWarning, match=r"step=00000006.ckpt.diverged is set aside"),
        pytest.raises(FloatingPointError),
    ):
        fit(
            tmp_path,
            Snapshots(every_n_steps=2, every_minutes=0),
            LambdaCallback(on_before_optimizer_step=refuse),
        )
    names = {p.name for p in (tmp_path / "snapshots").iterdir()}
    assert names == {"step=00000004.ckpt", "step=00000006.ckpt.diverged"}


@pytest.mark.slow  # starts two processes
def test_a_full_disk_on_one_rank_leaves_the_others_in_step(tmp_path):
    done = run_program("full_disk_on_one_rank.py", tmp_path)
    assert {"done 0 8", "done 1 8"} <= set(done.stdout.splitlines())
    assert "no snapshot at step 4" in done.stderr
    assert 4 not in steps(tmp_path) and {2, 6} <= set(steps(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every_n_steps": -1}, "every_n_steps"), ({"keep": 0}, r"`keep` \(=0\)")],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Snapshots(**options)
