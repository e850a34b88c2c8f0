"""A module and a data module of the user's own, by class path, through the whole command."""

import csv
import shlex
import shutil
import sys

import pytest
import torch
import yaml

from lightning_modules.cli.main import main
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.fit import run
from tests.helpers.paths import PROGRAMS

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint.s schedule of")  # longer on purpose

QUICK = (
    "--trainer.max_epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false "
    "--wandb.mode disabled --report.samples 0 --checkpoint.formats [torchscript] "
    "--checkpoint.background false --run.name r"
).split()
TINY = ["--model.model", "test_byobnet", "--model.lr", "0.01"]
FAST = [*QUICK, "--trainer.fast_dev_run", "true"]  # a batch, and no run folder


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A folder with a module of the user's own, found without PYTHONPATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    shutil.copy(PROGRAMS / "own_classes.py", tmp_path / "own.py")
    sys.modules.pop("own", None)


def latest(tmp_path):
    return (tmp_path / "runs/r/latest").resolve()


def test_own_classifier_and_data_train_resume_export_and_predict(tmp_path, capsys):
    own = ["--model", "own.MyClassifier", "--model.extra", "3", "--data", "own.MyData"]
    cli = run("fit", [*QUICK, *own, *TINY])
    assert type(cli.model).__name__ == "MyClassifier"
    assert (cli.model.extra, cli.model.num_classes, cli.model.hparams.lr) == (3, 2, 0.01)
    folder = latest(tmp_path)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "own.MyClassifier"
    assert saved["model"]["init_args"]["extra"] == 3

    checkpoint = str(folder / "checkpoints/last.ckpt")
    with pytest.raises(SystemExit):  # its configuration would choose what is imported
        main(["fit", "--ckpt_path", checkpoint])
    said = capsys.readouterr().err
    assert "names 'own.MyClassifier'" in said and "--config" in said
    more = ["--trainer.max_epochs", "2"]
    cli = run("fit", ["--config", str(folder / "config.yaml"), "--ckpt_path", checkpoint, *more])
    assert (cli.model.extra, cli.trainer.current_epoch) == (3, 2)

    alone = tmp_path / "alone.ckpt"
    shutil.copy(folder / "checkpoints/last.ckpt", alone)
    with pytest.raises(SystemExit):
        main(["validate", "--ckpt_path", str(alone), "--data", "own.MyData"])
    assert "give --model own.MyClassifier" in capsys.readouterr().err
    given = ["--model", "own.MyClassifier", "--data", "own.MyData"]
    cli = run("validate", [*QUICK[2:], *given, "--ckpt_path", str(alone)])
    assert (cli.model.extra, cli.model.hparams.lr) == (3, 0.01)  # the checkpoint's
    main(["export", str(alone), "shipped", "--formats", "[torchscript]"])
    assert (tmp_path / "shipped/manifest.json").is_file()


@pytest.mark.parametrize("by", ["flags", "file"])
def test_defaults_are_those_of_the_class_that_is_given(tmp_path, by):
    """And not the template's where its arguments have the same names."""
    given = ["--model", "own.OwnDefaults", "--data", "own.Sized"]
    if by == "file":
        sections = {"model": "own.OwnDefaults", "data": "own.Sized"}
        text = yaml.safe_dump({name: {"class_path": path} for name, path in sections.items()})
        (tmp_path / "mine.yaml").write_text(text)
        given = ["--config", "mine.yaml"]
    cli = run("fit", [*FAST, *given])
    assert (cli.model.hparams.lr, cli.datamodule.batch_size) == (0.03, 2)
    cli = run("fit", [*FAST, *given, "--model.lr", "0.02", "--data.batch_size", "4"])
    assert (cli.model.hparams.lr, cli.datamodule.batch_size) == (0.02, 4)


def test_arguments_of_a_class_on_the_command_line_may_be_in_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {extra: 3, lr: 0.02}")
    given = ["--model", "own.MyClassifier", "--config", "mine.yaml", "--data", "own.MyData"]
    cli = run("fit", [*FAST, *given, "--model.model", "test_byobnet"])
    assert (cli.model.extra, cli.model.hparams.lr) == (3, 0.02)


def test_the_command_that_continues_a_run_of_own_classes_works(tmp_path, capsys, monkeypatch):
    def interrupted(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "on_train_epoch_start", interrupted, raising=False)
        with pytest.raises(SystemExit):
            run("fit", [*QUICK, *TINY, "--data", "own.MyData", "--trainer.max_epochs", "2"])
    lines = capsys.readouterr().out.splitlines()
    command = next(line for line in lines if line.startswith("to continue: "))
    cli = run("fit", shlex.split(command)[4:])
    assert cli.trainer.current_epoch == 2


def test_channels_and_classes_come_from_the_data(tmp_path):
    cli = run("fit", [*FAST, *TINY, "--data", "own.MyData", "--data.channels", "1"])
    assert type(cli.model).__name__ == "ImageClassifier"
    assert next(cli.model.model.parameters()).shape[1] == 1
    assert cli.model.export_spec.class_names == ("ant", "bee")


def test_a_free_module_needs_no_argument_of_the_templates(tmp_path):
    run("fit", [*QUICK, "--model", "own.Free", "--model.width", "5", "--data", "own.MyData"])
    contents = torch.load(latest(tmp_path) / "checkpoints/last.ckpt", weights_only=True)
    assert contents["state_dict"]["model.0.weight"].shape[0] == 5


def test_class_paths_work_in_a_configuration_too(tmp_path):
    model = {"class_path": "own.MyClassifier", "init_args": {"model": "test_byobnet"}}
    data = {"class_path": "own.MyData", "init_args": {"count": 12}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    cli = run("fit", [*FAST, "--config", "own.yaml", "--model.extra", "4"])
    assert (cli.model.extra, len(cli.datamodule.pairs)) == (4, 12)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--data", "own.Nameless"], "lacks class_names"),
        (["--data", "own.Nameless", "--model", "own.Free"], "lacks class_names"),
        (["--data", "own.Untrained"], "lacks train_dataloader"),
        (["--data", "own.Unvalidated"], "lacks val_dataloader"),
        (["--data", "own.MyData", "--curriculum.phases", "[[0,32,1.0]]"], "lacks set_curriculum"),
        (["--model", "own.Missing"], "own.Missing"),
        (["--model", "own.MyData"], "subclass of LightningModule"),
        (["--model", "own.MyClassifier", "--model.extr", "1"], "did you mean model.extra"),
        (["--data", "own.MyData", "--imports", "[no_networks]"], "no_networks"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_few_lines(argv, complaint, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *QUICK, *argv])
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *QUICK, *TINY, "--data", "own.MyData", "--checkpoint.monitor", "val/acc"])
    assert "`monitor` (='val/acc')" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_imports_register_networks_of_their_own(tmp_path, capsys):
    (tmp_path / "networks.py").write_text(
        "import timm\n"
        "@timm.models.register_model\n"
        "def own_network(pretrained=False, **kwargs):\n"
        "    return timm.create_model('test_byobnet', **kwargs)\n"
    )
    own = ["--data", "own.MyData", "--model.model", "own_network", "--model.lr", "0.01"]
    run("fit", [*QUICK, *own, "--imports", "[networks]"])
    checkpoint = str(latest(tmp_path) / "checkpoints/last.ckpt")
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", checkpoint])
    assert "names 'networks'" in capsys.readouterr().err


def test_a_resumed_search_compares_own_arguments(tmp_path):
    own = ["--model", "own.MyClassifier", "--data", "own.MyData", *TINY, "--resume", "auto"]
    run("fit", [*QUICK, *own, "--model.extra", "3"])
    folder = latest(tmp_path)
    run("fit", [*QUICK, *own, "--model.extra", "3", "--trainer.max_epochs", "2"])
    assert latest(tmp_path) == folder
    cli = run("fit", [*QUICK, *own, "--model.extra", "4"])
    assert "model.extra 3 -> 4" in "".join(cli.continued.notes)


def test_tensorboard_gets_curves_pictures_and_the_artifacts_manifest(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "boards"]
    fit = [*QUICK, *TINY, "--data", "own.MyData", "--report.samples", "4", *logger]
    run("fit", fit)
    folder = latest(tmp_path)
    (events,) = (tmp_path / "boards").rglob("events.out.*")
    board = EventAccumulator(str(events)).Reload()
    tags = board.Tags()
    assert {"val/acc1", "train/loss_epoch", "lr"} <= set(tags["scalars"])
    assert {"report/samples", "report/curves"} <= set(tags["images"])
    assert any("artifact/best" in tag for tag in tags["tensors"])
    (value,) = board.Scalars("val/acc1")
    with (folder / "metrics/version_0/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc1"]]
    assert [float(row["val/acc1"]) for row in rows] == pytest.approx([value.value])
    for name in ("samples.png", "curves.png"):
        assert (folder / "report" / name).is_file()
    assert not list(folder.glob("wandb*"))
    run("fit", [*fit, "--resume", "auto", "--trainer.max_epochs", "2"])
    assert latest(tmp_path) == folder


def test_a_free_module_is_shown_and_tested_too(tmp_path):
    own = ["--model", "own.Free", "--data", "own.MyData", "--report.samples", "4"]
    run("fit", [*QUICK, *own, "--trainer.logger", "false"])
    assert (latest(tmp_path) / "report/samples.png").is_file()
