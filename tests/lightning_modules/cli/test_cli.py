"""The command line as a user meets it, on the digits, with the smallest model."""

import csv
import json
import re
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.cli.main import main
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.fit import run
from lightning_modules.run.folder import RunFolder
from mobileone.export import FORMATS, Manifest
from tests.helpers.command import FIT, error_of
from tests.helpers.processes import run_python

TINY = (
    "--config quickstart --model.model test_byobnet --model.warmup_epochs 0 "
    "--trainer.limit_train_batches 4 --trainer.check_val_every_n_epoch 1 "
    "--trainer.limit_val_batches 2 --trainer.limit_test_batches 2 --data.batch_size 32 "
    "--data.num_workers 0 --trainer.log_every_n_steps 1 --checkpoint.formats [torchscript] "
    "--checkpoint.background false "
    "--trainer.enable_progress_bar false --trainer.accelerator cpu"
).split()


DIGITS = "--data.dataset digits --data.input_size 32 --wandb.mode disabled".split()


class Stop(Exception):
    """Ends a run where a test wants it to."""


pytestmark = pytest.mark.usefixtures("here")


def fit(*more, epochs=1):
    """One new run in this process; its folder."""
    main(["fit", *TINY, "--trainer.max_epochs", str(epochs), *more])
    wandb.finish()


def interrupt(patch, error):
    """Let a training end with an error at the first batch of its second epoch."""
    hook = ImageClassifier.on_train_batch_start

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise error
        return hook(self, batch, batch_idx)

    patch.setattr(ImageClassifier, "on_train_batch_start", interrupted)


def read_table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of one finished run, not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fit("--wandb.mode", "disabled", "--model.lr", "0.07", "--model.model", "mobileone_mu0")
    return root / "runs"


@pytest.fixture
def trained(finished, tmp_path):
    """A finished run in the test's own folder."""
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    return (tmp_path / "runs/quickstart/latest").resolve()


def test_fit_leaves_everything_a_user_wants(tmp_path, capsys):
    fit()
    said = capsys.readouterr().out
    assert "epoch 0/0  step 4  train/loss_epoch" in said
    assert "checkpoints/epoch=000-step=000004.ckpt" in said
    assert "parity error" in said
    run = tmp_path / "runs/quickstart/latest"
    for name in ("best", "last"):
        assert (run / f"checkpoints/{name}.ckpt").is_file()
        assert (run / f"checkpoints/{name}/model.torchscript.pt").is_file()
        manifest = json.loads((run / f"checkpoints/{name}/manifest.json").read_text())
        assert manifest["spec"]["class_names"] == [str(n) for n in range(10)]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"] == "test_byobnet"
    rows = read_table(run / "metrics/version_0/metrics.csv")
    assert {"train/loss", "val/acc1", "lr", "weight_decay"} <= set(rows[0])
    for picture in ("samples", "curves"):
        assert (run / f"report/{picture}.png").stat().st_size > 10_000
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_wrong_flag_on_resuming_leaves_the_run_as_it_is(trained, capsys):
    before = (trained / "config.yaml").read_text()
    checkpoint = str(trained / "checkpoints/last.ckpt")
    said = error_of(capsys, "fit", "--ckpt_path", checkpoint, "--model.model", "mobileone_mu1")
    assert "holds a mobileone_mu0, not a mobileone_mu1" in said
    assert (trained / "config.yaml").read_text() == before


def test_a_run_that_fails_early_does_not_take_the_link(trained, monkeypatch):
    def broken(self, batch, batch_idx):
        raise Stop

    monkeypatch.setattr(ImageClassifier, "training_step", broken)
    with pytest.raises(Stop):
        fit("--wandb.mode", "disabled")
    assert (trained.parent / "latest").resolve() == trained


def test_a_resumed_run_stays_in_its_folder_when_the_link_moves(trained):
    through_link = RunFolder.of_checkpoint(str(trained.parent / "latest/checkpoints/last.ckpt"))
    assert through_link.path == trained
    assert RunFolder.of_checkpoint(str(trained / "checkpoints/best.ckpt")) == through_link


def test_only_rank_zero_makes_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    RunFolder.create(str(tmp_path / "runs"), "x")
    assert not (tmp_path / "runs").exists()


def test_runs_of_the_same_second_and_job_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    runs = [RunFolder.create(str(tmp_path), "x") for _ in range(3)]
    assert len({run.path for run in runs}) == len({run.wandb_id for run in runs}) == 3


@pytest.mark.slow
def test_two_processes_share_one_run(tmp_path):
    two = "--trainer.max_epochs 1 --trainer.devices 2 --trainer.strategy ddp".split()
    done = run_python("-m", "mobileone", "fit", *TINY, *two, timeout=500)
    runs = [p for p in (tmp_path / "runs/quickstart").iterdir() if not p.is_symlink()]
    assert len(runs) == 1
    assert (runs[0] / "checkpoints/best/manifest.json").is_file()
    assert len(list(runs[0].glob("wandb/offline-run-*"))) == 1
    assert done.stdout.count("best model of this run") == 1


def test_interrupted_run_says_how_to_continue(capsys, monkeypatch):
    interrupt(monkeypatch, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        fit("--wandb.mode", "disabled", epochs=2)
    command = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("to continue: ")
    )
    monkeypatch.undo()
    main([*shlex.split(command)[3:], "--wandb.mode", "disabled"])


def test_a_limit_of_one_is_one_batch_whatever_was_imported_before(monkeypatch, capsys):
    """`typing` gives the union that was made first, in its order: 1 was read as 1.0, all."""
    limits = [f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")]
    for name in limits:
        monkeypatch.setitem(Trainer.__init__.__annotations__, name, float | int | None)
    options = [word for name in limits for word in (f"--trainer.{name}", "1")]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert [repr(trainer[name]) for name in limits] == ["1"] * 4


def test_gray_images_need_no_second_option():
    gray = "--data.in_chans 1 --data.input_size 32 --checkpoint.formats torchscript,onnx"
    done = run("fit", [*TINY, *gray.split(), "--trainer.fast_dev_run", "true"])
    assert done.config_init.fit.checkpoint.formats == ("torchscript", "onnx")
    assert done.datamodule.data_config["input_size"] == (1, 32, 32)
    assert next(done.model.model.parameters()).shape[1] == 1


@pytest.mark.slow  # the same with fewer parts: test_resume, test_classifier
def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Same folder, same wandb run, same weights bit for bit."""
    fit(epochs=2)
    whole = (tmp_path / "runs/quickstart/latest").resolve()

    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Stop)
        with pytest.raises(Stop):
            fit(epochs=2)
    wandb.finish()
    broken = (tmp_path / "runs/quickstart/latest").resolve()
    assert broken != whole
    main(["fit", "--ckpt_path", str(broken / "checkpoints/last.ckpt")])

    for kind in ("state_dict", "current_model_state"):
        expected, resumed = (
            torch.load(run / "checkpoints/last.ckpt", weights_only=True)[kind]
            for run in (whole, broken)
        )
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[k], resumed[k]) for k in expected)
    ids = {p.name.split("-", 3)[3] for p in broken.glob("wandb/offline-run-*")}
    assert ids == {json.loads((broken / "run.json").read_text())["wandb_id"]}
    assert len(list(broken.glob("wandb/offline-run-*"))) == 2
    assert len(list(broken.glob("metrics/version_*"))) == 2


def test_validate_and_test_need_nothing_but_the_checkpoint(trained, capsys):
    """And take all images, whatever limits the training had, unless told otherwise."""
    checkpoint = ["--ckpt_path", str(trained / "checkpoints/best.ckpt")]
    trainer = run("validate", checkpoint).trainer
    assert trainer.num_val_batches == [12]  # 360 images, 32 a batch
    assert "val/acc1" in capsys.readouterr().out
    for more, count in (["--trainer.limit_test_batches", "2"], 64), ([], 360):
        main(["test", *checkpoint, *more])
        said = capsys.readouterr().out
        assert re.search(r"test/acc1 +│ [01]\.\d{4} +│", said)
        assert "those of the validation: there is no test split" in said
        assert f".png: {trained}/report/confusion_matrix.*" in said
        assert (trained / "report/confusion_matrix.png").is_file()
        rows = read_table(trained / "report/confusion_matrix.csv")
        assert len(rows) == 10
        assert sum(int(row[str(n)]) for row in rows for n in range(10)) == count


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["inspect", "checkpoints/best.ckpt"], "its artifact"),
        (["test", "--ckpt_path", "checkpoints/best"], "best.ckpt"),
        (["inspect", "."], "checkpoints/best?"),
        (["export", ".", "out"], "checkpoints/best.ckpt?"),
    ],
)
def test_what_is_near_a_checkpoint_or_an_artifact_leads_to_it(trained, words, meant, capsys):
    paths = [trained / word if "/" in word or word == "." else word for word in words]
    assert meant in error_of(capsys, *paths)


def test_predict_takes_a_checkpoint_or_an_artifact(trained, cache, tmp_path):
    images = next(p for p in cache.rglob("val") if p.is_dir())
    tables = []
    for number, source in enumerate(("checkpoints/best.ckpt", "checkpoints/best")):
        output = tmp_path / f"{number}.csv"
        main(["predict", str(trained / source), str(images), str(output), "--top_k", "2"])
        tables.append(read_table(output))
    artifact = str(trained / "checkpoints/best/model.torchscript.pt")
    main(["predict", str(images), "--artifact", artifact, "3.csv", "--top_k", "2"])
    assert read_table(tmp_path / "3.csv") == tables[1]
    assert len(tables[0]) == len(tables[1]) == 360
    assert [r["path"] for r in tables[0]] == [r["path"] for r in tables[1]]
    for ours, shipped in zip(*tables, strict=True):
        assert float(ours["probability"]) == pytest.approx(float(shipped["probability"]), abs=1e-4)


def test_a_first_try_of_three_steps_ends_with_files_that_work(cache, tmp_path, capsys):
    """With the quickstart as it is: float16 may overflow, the other file is there."""
    pytest.importorskip("coremltools")
    fast = "--data.num_workers 0 --checkpoint.background false --trainer.limit_val_batches 3 "
    fast += "--wandb.mode disabled --trainer.accelerator cpu"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(f"fit --config quickstart --trainer.max_steps 3 {fast}".split())
    said = [str(warning.message) for warning in caught]
    assert any("warm-up is cut to 2 of" in text for text in said)
    best = tmp_path / "runs/quickstart/latest/checkpoints/best"
    manifest = Manifest.load(best)
    assert "torchscript" in manifest.formats
    assert {*manifest.formats, *manifest.rejected} == {"torchscript", "coreml"}
    assert manifest.formats["torchscript"]["parity"]["images"] == 64
    assert any("train longer" in text for text in said) == bool(manifest.rejected)
    main(["predict", str(best), str(next(cache.rglob("val")) / "3"), "3.csv"])
    assert len(read_table(tmp_path / "3.csv")) > 10


def test_an_export_that_leaves_a_format_out_keeps_the_others_and_exits_with_1(
    trained, tmp_path, monkeypatch, capsys
):
    def no_converter(model, spec, path, metadata):
        raise RuntimeError("no such operator")

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=no_converter))
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    with pytest.raises(SystemExit) as caught:
        main(["export", checkpoint, "some", "--formats", "[onnx,torchscript]"])
    assert caught.value.code == 1
    (written, left_out, folder) = capsys.readouterr().out.splitlines()
    assert written.startswith("torchscript  model.torchscript.pt, ")
    assert left_out == "onnx         left out: RuntimeError: no such operator"
    assert folder == "-> some" and (tmp_path / "some/model.torchscript.pt").is_file()
    main(["export", checkpoint, "all", "--formats", "[torchscript]"])
    error = error_of(capsys, "export", checkpoint, "none", "--formats", "[onnx]")
    assert "none is not published: onnx: RuntimeError: no such operator" in error
    assert not Path("none").exists()


def test_every_file_of_an_artifact_predicts_and_is_described(trained, cache, tmp_path, capsys):
    formats = ["torchscript", "torch_export", "onnx", "coreml_fp32"]
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    main(["export", checkpoint, "shipped", "--formats", json.dumps(formats)])
    images = str(next(cache.rglob("val")) / "3")
    tables = []
    for name in formats:
        main(["predict", "shipped", images, f"{name}.csv", "--format", name, "--progress=false"])
        tables.append(read_table(tmp_path / f"{name}.csv"))
    for table in tables:
        assert [row["path"] for row in table] == [row["path"] for row in tables[0]]
        for row, first in zip(table, tables[0], strict=True):
            assert abs(float(row["probability"]) - float(first["probability"])) < 0.02
    capsys.readouterr()
    main(["inspect", "shipped"])
    described = capsys.readouterr().out
    assert described.count("convolutions, 0 norms, 0 additions") == len(formats)
    assert "as the manifest says" in described
    Path("shipped/model.onnx").rename("alone.onnx")
    main(["inspect", "alone.onnx"])
    described = capsys.readouterr().out
    assert "27 convolutions, 0 norms, 0 additions" in described
    assert "10: '0', '1'" in described
    (Path("shipped") / "model.onnx").write_bytes(b"")
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", "shipped"])
    assert "NOT AS THE MANIFEST SAYS: shipped does not match" in capsys.readouterr().out


def test_explicit_flag_wins_over_the_checkpoint(trained, tmp_path, monkeypatch):
    """LightningCLI alone lets the checkpoint's hyper-parameters override flags."""
    lone = tmp_path / "lone.ckpt"
    lone.write_bytes((trained / "checkpoints/last.ckpt").read_bytes())
    seen = []

    def setup(self, stage):
        seen.append(self.hparams)
        raise Stop

    monkeypatch.setattr(ImageClassifier, "setup", setup)
    data = ["--data.dataset", "digits", "--data.input_size", "32"]
    with pytest.raises(Stop):
        main(["fit", "--ckpt_path", str(lone), "--model.momentum", "0.8", *data])
    assert seen[0]["momentum"] == 0.8
    assert seen[0]["model"] == "mobileone_mu0"  # from the checkpoint
    assert seen[0]["lr"] == 0.07  # from the checkpoint


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["fti"], "unknown subcommand 'fti'; choose one of: fit, validate"),
        (["fit"], "root is not set"),
        (["fit", "--data.root", "nowhere"], "nowhere"),
        (["fit", "--config", "quickstart", "--trainer.max_epochs", "1"], "before the first valid"),
        (["fit", *DIGITS, "--trainer.limit_val_batches", "0"], "nothing would be saved"),
        (["fit", *DIGITS, "--trainer.check_val_every_n_epoch", "0"], "must be at least 1"),
        (["fit", "--data.dataset", "digits", "--model.model", "mobilone_s0"], "mobileone_s0"),
        (["fit", "--config", "quickstrat"], "quickstrat"),
        (["fit", "--data.dataset", "digits", "--ckpt_path", "no.ckpt"], "no.ckpt"),
        (["test", "--data.dataset", "digits"], "--ckpt_path is needed"),
        (["fit", "--data.dataset", "digits", "--model.lrr", "1"], "lrr"),
        (["predict", "no.ckpt", ".", "out.csv"], "no images in"),
        (["export", "no.ckpt", "out"], "no.ckpt"),
        (["fit", "--modell.lr", "1"], "there is no option 'modell.lr'; did you mean model.lr"),
        (
            ["fit", *DIGITS, "--model.schedule", "stepp"],
            "linear, step, constant; did you mean step?",
        ),
        (["fit", *DIGITS, "--trainer.max_epochs", "x"], "_epochs x must be a whole number or null"),
        (["fit", *DIGITS, "--model.cutmix", "abc"], "--model.cutmix abc must be a number"),
        (
            ["fit", *DIGITS, "--ema.validate", "avg"],
            "--ema.validate avg must be one of average, raw",
        ),
        (["fit", *DIGITS, "--model.in_chans", "1"], "the data have 3, and decide; leave it out"),
        (["fit", "--image_size", "64"], "no option 'image_size'; did you mean data.input_size"),
        (["fit", *DIGITS, "--trainer.accelerator", "tpu"], "torch_xla"),
        (["fit", *DIGITS, "--trainer.strategy", "dpp"], "--trainer: You selected an invalid"),
        (["fit", *DIGITS, "--run.root", "/dev/null"], "Not a directory: /dev/null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_a_line(argv, complaint, capsys, tmp_path):
    said = error_of(capsys, *argv)
    assert complaint in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 5
    assert list(tmp_path.glob("runs/*/*")) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modell:\n  lr: 1\n", "no option 'modell.lr' in own.yaml; did you mean model.lr"),
        ("model:\n  lr: [1\n", "own.yaml, line 3 is not YAML: expected"),
        ("- 1\n", "own.yaml holds a list: a configuration has sections"),
    ],
)
def test_a_fault_in_a_configuration_is_told_with_its_file(text, complaint, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(text)
    said = error_of(capsys, "fit", "--config", "quickstart", "--config=own.yaml")
    assert complaint in said
    assert len(said.splitlines()) < 3


def test_weights_that_the_hub_does_not_give_are_told_in_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pretrained = "--model.model test_byobnet --model.pretrained true".split()
    said = error_of(capsys, "fit", *DIGITS, *pretrained)
    assert "--model.pretrained false --model.weights FILE" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_online_tracking_without_a_key_is_refused_before_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = error_of(capsys, "fit", *TINY, "--wandb.mode", "online")
    assert "`wandb login`" in said
    assert "WARNING" not in said
    assert not (tmp_path / "runs").exists()


def test_the_help_of_fit_lists_the_options_of_model_and_data(capsys):
    """They belong to classes that may be others, which jsonargparse's own help leaves out."""
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--model.lr LR learning rate" in said and "--data.batch_size BATCH_SIZE" in said
    assert "--model.model MODEL timm name" in said
    assert "--ema.decay" in said and "--trainer.max_epochs" in said


def test_collapse_is_an_option_of_the_run_not_of_the_checkpoint(trained):
    checkpoint = trained / "checkpoints/last.ckpt"
    for mode in ("never", "always"):
        module = ImageClassifier.load_from_checkpoint(checkpoint, collapse=mode, weights_only=True)
        assert module.model.stem.collapse == mode
    assert not any(
        "collapse" in key for key in torch.load(checkpoint, weights_only=True)["state_dict"]
    )


def test_a_network_that_folds_in_eval_mode_only_is_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main([*FIT, "--model.model", "efficientvim_m1", "--trainer.fast_dev_run", "true"])
    assert "efficientvim_m1: " in capsys.readouterr().out
