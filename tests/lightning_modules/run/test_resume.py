"""`--resume auto`: which run is resumed, from which checkpoint, and that kills leave no trace."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.cli.main import main
from lightning_modules.errors import UsageError
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.folder import RunFolder
from lightning_modules.run.resume import find_continuation, newest_usable, why_unusable
from tests.helpers import command as helpers
from tests.helpers.command import error_of
from tests.helpers.processes import run_program, start_python, wait_for

CONFIG = {"model": {"lr": 0.1, "model": "x"}, "trainer": {"max_epochs": 3}, "ckpt_path": None}
FIT = [*helpers.FIT, "--run.name", "r", "--resume", "auto"]

pytestmark = pytest.mark.usefixtures("here")


def make_run(parent, name, config=CONFIG):
    path = parent / name
    (path / "checkpoints").mkdir(parents=True)
    (path / "snapshots").mkdir()
    (path / "run.json").write_text('{"wandb_id": "x"}')
    if config is not None:
        RunFolder.read(path).write_config(yaml.safe_dump(config))
    return path


def write(path, age, **contents):
    state = {"state_dict": {"w": torch.ones(99)}, "optimizer_states": [], **contents}
    torch.save(state, path)
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


def test_nothing_there_is_a_new_run(tmp_path):
    found = find_continuation(tmp_path / "none", CONFIG)
    assert (found.run, found.checkpoint) == (None, None)
    assert "a new run begins" in found.notes[0]


def test_the_newest_run_of_the_same_configuration_goes_on(tmp_path):
    for name in ("20250101-000000", "20250101-000000-2", "20250101-000000-10"):
        make_run(tmp_path, name)
    other = {**CONFIG, "model": {"lr": 0.2, "model": "x"}}
    make_run(tmp_path, "20260101-000000", other)
    make_run(tmp_path, "20260102-000000", None)
    found = find_continuation(tmp_path, CONFIG)
    assert found.run.path.name == "20250101-000000-10"
    assert found.checkpoint is None
    longer = {**CONFIG, "trainer": {"max_epochs": 9}, "ckpt_path": "x.ckpt"}
    assert find_continuation(tmp_path, longer).run == found.run


def test_a_run_with_a_checkpoint_goes_before_a_newer_one_without(tmp_path):
    trained = make_run(tmp_path, "20250101-000000")
    checkpoint = write(trained / "checkpoints/a.ckpt", 50)
    make_run(tmp_path, "20250102-000000")
    found = find_continuation(tmp_path, CONFIG)
    assert (found.run.path, found.checkpoint) == (trained, checkpoint)


@pytest.mark.parametrize("record", ["", "[]", "null", "{}"])
def test_a_damaged_record_is_passed_over(tmp_path, record):
    whole = make_run(tmp_path, "20250101-000000")
    (make_run(tmp_path, "20250102-000000") / "run.json").write_text(record)
    found = find_continuation(tmp_path, CONFIG)
    assert found.run.path == whole
    assert "skipped" in found.notes[0] and "20250102-000000" in found.notes[0]


def test_no_flipped_bit_keeps_an_older_checkpoint_from_being_found(tmp_path):
    run = make_run(tmp_path, "r")
    good = write(run / "checkpoints/a.ckpt", 50)
    broken = write(run / "checkpoints/b.ckpt", 40)
    contents = broken.read_bytes()
    for place in range(0, len(contents), 7):
        flipped = bytearray(contents)
        flipped[place] ^= 1 << place % 8
        broken.write_bytes(flipped)
        assert newest_usable(run)[0] in (good, broken)


def test_a_name_stays_below_the_root(tmp_path):
    for name in ("../other", "/other"):
        with pytest.raises(ValueError, match=r"leads out of --run\.root"):
            RunFolder.parent(str(tmp_path), name)


OTHER = {**CONFIG, "model": {"lr": 0.2, "model": "x"}}


def test_other_options_are_named(tmp_path):
    """Of a run without a checkpoint: nothing is lost."""
    make_run(tmp_path, "20250101-000000")
    found = find_continuation(tmp_path, OTHER)
    assert found.run is None
    assert "has other options: model.lr 0.1 -> 0.2" in found.notes[0]


@pytest.mark.parametrize("epoch", [1, None])
def test_an_unfinished_run_with_other_options_is_not_left_behind(tmp_path, epoch):
    """`None`: the record of an older version has nothing, the checkpoint's epoch does."""
    run = make_run(tmp_path, "20250101-000000")
    contents = {} if epoch is None else {"epoch": epoch}
    checkpoint = write(run / "checkpoints/a.ckpt", 50, **contents)
    make_run(tmp_path, "20250102-000000", {"model": {"lr": 0.3}})  # killed at its start
    ways = rf"model\.lr 0\.1 -> 0\.2.*--run\.name.*--ckpt_path {re.escape(str(checkpoint))}"
    with pytest.raises(UsageError, match=ways):
        find_continuation(tmp_path, OTHER)
    if epoch is None:
        RunFolder.read(run).set_finished(finished=True)
    else:
        write(run / "checkpoints/a.ckpt", 50, epoch=2)
    assert find_continuation(tmp_path, OTHER).run is None


@pytest.mark.parametrize(
    "options",
    [
        {"trainer": {"max_epochs": 3, "devices": 2, "strategy": "ddp", "num_nodes": 4}},
        {"trainer": {"max_epochs": 3, "accelerator": "gpu", "limit_val_batches": 9}},
        {"model": {"lr": 0.1, "model": "x", "collapse": "never", "skip_nonfinite": 3}},
        {"model": {"lr": 0.1, "model": "x", "invented_since": None}},
        {"data": {"num_workers": 7}, "checkpoint": {"formats": [], "timeout": 1}},
    ],
)
def test_what_does_not_change_the_training_goes_on(tmp_path, options):
    run = make_run(tmp_path, "20250101-000000")
    defaults = {"model": {"lr": 0.1, "invented_since": None}, "trainer": {"devices": "auto"}}
    assert find_continuation(tmp_path, {**CONFIG, **options}, defaults).run.path == run


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"lr": 0.1, "model": "x", "invented_since": True}},
        {"model": {"lr": 0.1, "model": "x", "model_kwargs": {"drop_rate": 0.3}}},
        {"trainer": {"precision": "16-mixed"}},
        {"checkpoint": {"monitor": "val/acc1"}},
    ],
)
def test_what_changes_the_training_does_not(tmp_path, options):
    run = make_run(tmp_path, "20250101-000000")
    write(run / "checkpoints/a.ckpt", 50)
    defaults = {"model": {"lr": 0.1, "model_kwargs": None}, "checkpoint": {"monitor": "val/loss"}}
    with pytest.raises(UsageError, match="is not finished"):
        find_continuation(tmp_path, {**CONFIG, **options}, defaults)


def test_one_place_may_be_spelt_in_two_ways(tmp_path, monkeypatch):
    (tmp_path / "d3").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    run = make_run(runs, "20250101-000000", {**CONFIG, "data": {"root": "d3"}})
    write(run / "checkpoints/a.ckpt", 50)
    for root in (str(tmp_path / "d3"), "./d3/", f"../{tmp_path.name}/d3"):
        assert find_continuation(runs, {**CONFIG, "data": {"root": root}}).run.path == run
    with pytest.raises(UsageError, match=r"data\.root 'd3' -> 'd4'"):
        find_continuation(runs, {**CONFIG, "data": {"root": "d4"}})


def test_the_newest_usable_checkpoint_counts_and_the_others_are_named(tmp_path):
    run = make_run(tmp_path, "r")
    write(run / "checkpoints/a.ckpt", 50)
    good = write(run / "snapshots/b.ckpt", 40)
    flipped = write(run / "snapshots/c.ckpt", 30)
    data = bytearray(flipped.read_bytes())
    at = data.index(torch.ones(99).numpy().tobytes())
    data[at] ^= 1
    flipped.write_bytes(data)
    os.utime(flipped, (10**9 - 30,) * 2)
    weights = run / "checkpoints/d.ckpt"
    torch.save({"state_dict": {}}, weights)
    os.utime(weights, (10**9 - 20,) * 2)
    cut = write(run / "checkpoints/e.ckpt", 10)
    cut.write_bytes(cut.read_bytes()[:-100])
    empty = run / "checkpoints/f.ckpt"
    empty.touch()
    (run / "checkpoints/last.ckpt").symlink_to("gone.ckpt")
    found, notes = newest_usable(run)
    assert found == good
    assert len(notes) == 4
    assert "holds weights only" in why_unusable(weights)
    assert "not as it was written" in why_unusable(flipped)
    assert all("cut short" in why_unusable(path) for path in (cut, empty))


def test_the_step_in_its_name_says_which_is_newest(tmp_path):
    """Not the file's time, which `cp -r` and a clock that was set change."""
    run = make_run(tmp_path, "r")
    late = write(run / "checkpoints/epoch=001-step=000200.ckpt", 50)
    write(run / "snapshots/step=00000150.ckpt", 10)
    assert newest_usable(run)[0] == late


@pytest.mark.parametrize("part", ["state_dict", "current_model_state", "optimizer_states"])
def test_a_checkpoint_that_is_not_finite_is_passed_over_by_name(tmp_path, part):
    run = make_run(tmp_path, "r")
    mask = {"mask": torch.tensor([0, -torch.inf])}
    good = write(run / "checkpoints/a.ckpt", 50, current_model_state=mask)
    bad = {"w": torch.tensor([1, torch.nan])}
    contents = [{"state": {0: bad}}] if part == "optimizer_states" else bad
    poisoned = write(run / "snapshots/b.ckpt", 40, **{part: contents})
    found, notes = newest_usable(run)
    assert found == good
    assert f"skipped {poisoned}: it holds values that are not finite ({part}/" in notes[0]


@pytest.mark.filterwarnings("ignore:the checkpoint's schedule of")
def test_same_command_twice_is_one_run_and_longer_goes_on(tmp_path, capsys):
    main(FIT)
    assert "a new run begins" in capsys.readouterr().out
    (run,) = [p for p in (tmp_path / "runs/r").iterdir() if not p.is_symlink()]
    before = sorted((run / "checkpoints").iterdir())
    main(FIT)
    assert "resumes from" in capsys.readouterr().out
    assert sorted((run / "checkpoints").iterdir()) == before
    assert RunFolder.read(run).finished
    main([*FIT, "--trainer.max_epochs", "3"])
    assert len([p for p in (tmp_path / "runs/r").iterdir() if not p.is_symlink()]) == 1
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


def test_a_truncated_checkpoint_is_passed_over_or_another_is_offered(tmp_path, capsys):
    main(FIT)
    run = (tmp_path / "runs/r/latest").resolve()
    last = (run / "checkpoints/last.ckpt").resolve()
    whole = torch.load(last, weights_only=True)
    last.write_bytes(last.read_bytes()[:-1000])
    said = error_of(capsys, "fit", "--ckpt_path", run / "checkpoints/last.ckpt")
    assert "damaged, cut short" in said
    assert f"checkpoint of this run that can be read is {run}/snapshots/step=00000007" in said
    main(FIT)
    assert f"skipped {last}: it is damaged or cut short" in capsys.readouterr().out
    again = torch.load(last, weights_only=True)
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in whole["state_dict"].items())


def test_a_named_pipe_is_no_checkpoint(tmp_path):
    run = make_run(tmp_path, "20260101-000000")
    os.mkfifo(run / "checkpoints/epoch=000-step=000009.ckpt")
    assert newest_usable(run) == (None, [])


def test_a_missing_artifact_is_made_up_for(tmp_path):
    """A run that was killed after its last checkpoint, before its artifact."""
    main(FIT)
    checkpoints = (tmp_path / "runs/r/latest").resolve() / "checkpoints"
    artifact = (checkpoints / "last").resolve()
    for path in artifact.iterdir():
        path.unlink()
    artifact.rmdir()
    (checkpoints / "last").unlink()
    (checkpoints / "last.ckpt").unlink()
    main(FIT)
    assert (checkpoints / "last/manifest.json").is_file()
    assert (checkpoints / "last.ckpt").resolve().is_file()


@pytest.mark.slow
def test_a_checkpoint_that_is_named_goes_before_auto(tmp_path, capsys):
    """The run's own configuration, which says auto, is read along with its checkpoint."""
    main(FIT)
    run = (tmp_path / "runs/r/latest").resolve()
    snapshot = run / "snapshots/step=00000007.ckpt"
    (run / "checkpoints/epoch=001-step=000008.ckpt").unlink()
    capsys.readouterr()
    main(["fit", "--ckpt_path", str(snapshot)])
    assert "resume:" not in capsys.readouterr().out
    assert (run / "checkpoints/epoch=001-step=000008.ckpt").is_file()


def test_weights_that_give_no_finite_loss_are_never_saved(tmp_path, capsys):
    """All of them are finite, and too large."""
    diverges = [*FIT, "--model.lr", "1e36", "--trainer.limit_train_batches", "1"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(diverges)
        said = capsys.readouterr()
        assert "validation's loss is nan after step 1 (epoch 0)" in said.err
        assert "to continue" not in said.out
    assert not list(tmp_path.glob("runs/r/*/*/*.ckpt"))


def test_what_is_refused_before_it_begins_is_not_offered_again(tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise ValueError("the checkpoint was trained on other classes")

    main(FIT)
    monkeypatch.setattr(ImageClassifier, "on_load_checkpoint", refuse)
    with pytest.raises(ValueError, match="other classes"):
        main([*FIT, "--trainer.max_epochs", "3"])
    assert "to continue" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--trainer.max_epochs 0", "--trainer.max_epochs 0 trains nothing"),
        ("--trainer.max_steps 0", "--trainer.max_steps 0 trains nothing"),
        ("--trainer.max_epochs -1", "max_epochs -1 and --trainer.max_steps -1 give no end"),
        ("--trainer.max_epochs -1 --curriculum.phases [[0,32,1]]", "curriculum scales its phases"),
        ("--model.teacher test_byobnet --model.teacher_weights none.pth", "none.pth"),
    ],
)
def test_what_cannot_be_trained_is_refused_without_a_folder(tmp_path, capsys, options, complaint):
    assert complaint in error_of(capsys, *FIT, *options.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--model.optimizer sgdd", "unknown `optimizer` (='sgdd'); did you mean sgd"),
        (
            '--model.optimizer_kwargs {"foo":1}',
            "`optimizer_kwargs` (={'foo': 1}) has 'foo', which momentum does not take there (valid "
            "names: dampening, ",
        ),
        (
            '--model.optimizer_kwargs {"lr":1}',
            "learning rate, weight decay and momentum are options",
        ),
        (
            '--model.optimizer adamw --model.optimizer_kwargs {"betas":[2,3]}',
            "adamw does not take `optimizer_kwargs` (={'betas': [2, 3]}): Invalid beta",
        ),
        ("--model.warmup_epochs -1", "`warmup_epochs` (=-1.0) must be at least 0"),
        ("--model.weight_decay_end -1", "`weight_decay_end` (=-1.0) must be at least 0"),
        ("--model.momentum 2", "`momentum` (=2.0) must be below 1"),
        ("--model.lr_reference_batch 0", "`lr_reference_batch` (=0) must be at least 1"),
        (
            '--model.model_kwargs {"foo":1}',
            "`model_kwargs` (={'foo': 1}) do not fit the model test_",
        ),
        ('--model.model_kwargs {"drop_rate":5}', "do not fit the model test_byobnet: dropout prob"),
        ("--trainer.accumulate_grad_batches 0", "accumulate_grad_batches 0 must be at least 1"),
        ("--trainer.gradient_clip_val -1", "gradient_clip_val -1 must be at least 0"),
        ("--trainer.num_sanity_val_steps -5", "num_sanity_val_steps -5 must be at least -1"),
        ("--trainer.limit_train_batches 0", "--trainer.limit_train_batches 0 trains nothing"),
        ("--trainer.val_check_interval 0", "must be a number of batches from 1"),
        ("--trainer.val_check_interval 99", "--trainer: `val_check_interval` (99) must be less"),
        ("--trainer.devices 0", "devices='0'"),
        ("--trainer.precision 17", "--trainer.precision 17 must be 64, 32, 16, transformer-engine"),
        ("--trainer.logger foo", "foo must be the path of a class, a list, true or false or null"),
        ("--checkpoint.monitor foo", "`monitor` (='foo') names 'foo', which is not logged (valid"),
        ("--checkpoint.monitor val/acc --trainer.callbacks []", "valid names: lr, train/loss, "),
        (
            "--checkpoint.filename {step}-{foo}",
            "(='{step}-{foo}') names 'foo', which is not logged",
        ),
        ("--checkpoint.filename {step:zz}", "`filename` (='{step:zz}') cannot be filled in"),
        ("--checkpoint.filename {step", "`filename` (='{step') cannot be filled in (expected '}'"),
        ("--checkpoint.filename {step}-{val/acc1:d}", "cannot be filled in (Unknown format code"),
        (
            '--checkpoint.metadata {"author":5}',
            "error: --checkpoint.metadata.author 5 must be of type str\n",
        ),
        ("--checkpoint.timeout 0", "`timeout` (=0.0) must be greater than 0 seconds"),
        ("--checkpoint.dirpath afile/here", "--checkpoint.dirpath afile/here: "),
        ("--snapshots.dirpath afile", "afile is a file; name a folder"),
        ("--seed_everything -1", "--seed_everything: -1 is not in bounds"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_line(tmp_path, capsys, options, complaint):
    """As for a new user, whose wandb log is offline."""
    (tmp_path / "afile").touch()
    said = error_of(capsys, *FIT, "--wandb.mode", "offline", *options.split())
    assert complaint in said
    assert len([line for line in said.splitlines() if "error: " in line]) == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_refused_by_the_trainer_leaves_nothing_of_wandb(
    tmp_path, capsys, monkeypatch
):
    def refuse(*args):
        raise ValueError("no such weights")

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/notes.txt").touch()
    monkeypatch.setattr(ImageClassifier, "on_fit_start", refuse)
    with pytest.raises(ValueError, match="no such weights"):
        main([*FIT, "--wandb.mode", "offline"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes.txt"]


def test_a_run_that_is_further_than_its_end_is_refused_in_a_sentence(tmp_path, capsys):
    at = {"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 8}}}}}
    checkpoint = write(tmp_path / "a.ckpt", 0, **at)
    said = error_of(capsys, *FIT, "--ckpt_path", checkpoint, "--trainer.max_epochs", "1")
    assert "a.ckpt was written after 8 epochs, more than --trainer.max" in said


def test_a_metric_that_is_not_logged_is_refused_before_the_first_epoch(capsys, monkeypatch):
    monkeypatch.setattr(ImageClassifier, "training_step", lambda *args: 1 / 0)
    said = error_of(capsys, *FIT, "--checkpoint.monitor", "val/accuracy")
    assert "`monitor` (='val/accuracy') names 'val/accuracy', which is not logged" in said
    assert "val/acc1" in said


# on rank 0: longer than another rank takes to end, and Lightning to see that it was with an error
SLOW_TO_LEAVE = """
import atexit, os, sys, time
if "fit" in sys.argv and "LOCAL_RANK" not in os.environ:
    atexit.register(time.sleep, 15)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_of_two_processes_rank_0_ends_last(tmp_path, number):
    """It waits for the export; SIGTERM reaches one process, Ctrl-C all of them."""
    (tmp_path / "slow_to_leave.py").write_text(SLOW_TO_LEAVE)
    two = "--trainer.devices 2 --trainer.strategy ddp --trainer.max_epochs 100".split()
    background = ["--checkpoint.background", "true", "--data.num_workers", "1"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    command = [*FIT, *two, *background, "--imports", "[slow_to_leave]"]
    process = start_python("-m", "mobileone", *command, **pipe)
    wait_for(lambda: list(tmp_path.glob("runs/r/*/checkpoints/*.ckpt")))
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=200)  # the pipe's end: rank 1 has ended, too
    assert process.returncode == 128 + number, said
    assert said.count("to continue: mobileone fit --ckpt_path") == 1
    assert said.count("stopping after this step") == (number == signal.SIGINT)
    assert list(tmp_path.glob("runs/r/*/checkpoints/last/manifest.json"))
    assert not list(tmp_path.glob("runs/r/*/checkpoints/*error*"))


@pytest.mark.slow
def test_a_rank_does_not_wait_to_connect_to_a_rank_0_that_was_killed(tmp_path):
    """It would for half an hour."""
    two = "--trainer.devices 2 --trainer.strategy ddp".split()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start_python("-m", "mobileone", *FIT, *two, **pipe)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: any(_is_rank_1(pid) for pid in children.read_text().split()))
    process.kill()
    said, _ = process.communicate(timeout=120)  # the pipe's end: rank 1 has ended, too
    assert said.endswith("rank 0 has ended, and so does this rank\n")


def _is_rank_1(pid):
    return b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_sigterm_exits_with_143_and_the_same_command_goes_on(tmp_path, group):
    """Also where all processes get it, data workers too, as `timeout` and systemd do."""
    command = ["-m", "mobileone", *FIT, "--trainer.max_epochs", "100", "--data.num_workers", "1"]
    process = start_python(*command, stdout=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob("runs/r/*/checkpoints/last.ckpt")))
    if group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 143
    assert "to continue: mobileone fit --ckpt_path" in said
    found, _ = newest_usable((tmp_path / "runs/r/latest").resolve())
    assert found.parent.name == "snapshots"


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path):
    """Five kills, in a process that forks, without threads; the program makes more."""
    done = run_program("soak_resume.py", "--kills", 5, "--seed", 5, timeout=500)
    assert "5 kills" in done.stdout
