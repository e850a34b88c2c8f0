"""`mobileone segment` and `mobileone detect` as a user meets them."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from lightning_modules.cli.main import main
from lightning_modules.dense.models import Detector, Segmenter
from lightning_modules.run.folder import RunFolder
from tests.helpers.command import error_of
from tests.helpers.variants import slow

pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `dense`")
pytest.importorskip("pycocotools", reason="needs the extra `dense`")

ROOT = Path(str(files("configs"))) / "dense"
RECIPES = sorted(path.name for path in ROOT.glob("*.yaml"))
QUIET = "--trainer.enable_progress_bar false --trainer.accelerator cpu".split()
TINY = "--model.model test_byobnet --data.size 64 --data.batch_size 4 --data.num_workers 0".split()
SHAPES = [*TINY, "--data.count", "8", *QUIET]
OWN = {"segment": ["--model.architecture", "unet"], "detect": ["--model.size", "64"]}


def run(*words):
    """A command as a process of its own would run it."""
    main(list(words))
    wandb.finish()


def fit(task, *more):
    """A run on generated shapes; its folder."""
    run(task, "fit", *SHAPES, *OWN[task], *more)
    return Path(f"runs/{task}/latest").resolve()


def test_all_recipes_are_known():
    expected = ["detect_coco", "detect_shapes", "segment_shapes", "segment_voc"]
    assert RECIPES == [f"{name}.yaml" for name in expected]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_for_a_batch(recipe, request):
    text = (ROOT / recipe).read_text()
    task, _, name = recipe.removesuffix(".yaml").partition("_")
    assert f"mobileone {task} fit --config configs/dense/{recipe}" in text
    assert "Expected:" in text and "Hardware:" in text
    assert yaml.safe_load(text)["run"]["name"] == recipe.removesuffix(".yaml")
    small = "--data.batch_size 2 --data.num_workers 0 --model.pretrained false".split()
    quick = "--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.precision 32".split()
    if name == "shapes":
        small += ["--data.count", "4", "--data.size", "64"]
    else:
        small += ["--data.root", str(request.getfixturevalue(name))]
    if name == "voc":
        small += ["--data.size", "64"]
    main([task, "fit", "--config", f"dense/{task}_{name}", *small, *quick])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("task", "dataset", "classes"),
    [
        slow("segment", "voc", 21),
        ("detect", "coco", 4),
    ],
)
def test_real_layouts_train_and_validate(task, dataset, classes, request, capsys):
    root = ["--data.dataset", dataset, "--data.root", str(request.getfixturevalue(dataset))]
    own = [*OWN[task], *TINY, "--data.batch_size", "2", *QUIET]
    run(task, "fit", *root, *own, "--trainer.max_epochs", "2")
    said = capsys.readouterr().out
    assert f"{classes} classes" in said and "step 4" in said  # four images, two a batch
    kind = {"segment": Segmenter, "detect": Detector}[task]
    best = Path(f"runs/{task}/latest/checkpoints/best.ckpt")
    module = kind.load_from_checkpoint(best, weights_only=True)
    assert module.hparams["num_classes"] == len(module.class_names) == classes
    assert "bird" in module.class_names
    # the run's own configuration is found, and the best model has the score that it was chosen for
    run(task, "validate", "--ckpt_path", str(best))
    shown = re.search(r"val/(?:miou|map) +│ +([0-9.e-]+)", capsys.readouterr().out)
    savers = torch.load(best, weights_only=True)["callbacks"].values()
    (score,) = (s["best_model_score"] for s in savers if s.get("monitor"))
    assert float(shown.group(1)) == pytest.approx(float(score), abs=5.1e-5)  # four digits


def test_other_classes_than_the_checkpoints_are_refused(coco, make_coco, capsys):
    words = ["--data.dataset", "coco", *OWN["detect"], *TINY, "--data.batch_size", "2", *QUIET]
    run("detect", "fit", *words, "--data.root", str(coco), "--trainer.max_epochs", "1")
    checkpoint = "runs/detect/latest/checkpoints/last.ckpt"
    words = "--ckpt_path", checkpoint, "--data.root", make_coco("other", "fish")
    said = error_of(capsys, "detect", "validate", *words)
    assert "class 2 is 'bird' in the checkpoint and 'fish'" in said


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_run_has_what_fit_gives(task, capsys):
    folder = fit(task, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1")
    said = capsys.readouterr().out
    assert f"run folder: {folder}" in said and f"mobileone {task} export {folder}" in said
    assert RunFolder.of_checkpoint(str(folder / "checkpoints/last.ckpt")).path == folder
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(list(folder.glob("snapshots/*.ckpt"))) == 2
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    metrics = (folder / "metrics/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_epoch", "train/loss", "lr"} <= set(metrics)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"] == "test_byobnet"
    assert config["run"]["name"] == task
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 1 and last["averaging_state"]["n_averaged"] == 4
    raw, averaged = last["current_model_state"], last["state_dict"]
    assert any(not torch.equal(raw[name], averaged[name]) for name in averaged)
    assert last["class_names"] == ["background", "circle", "square", "triangle"]


@pytest.mark.slow
def test_the_last_checkpoint_is_kept_beside_a_better_one():
    """The best has the largest loss here: that of the first epoch."""
    worst = "--checkpoint.monitor val/loss --checkpoint.mode max".split()
    folder = fit("segment", "--trainer.max_epochs", "2", *worst)
    epochs = {
        name: torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 1}


def test_resume_goes_on_in_the_same_run(capsys):
    first = fit("segment", "--trainer.max_epochs", "1")
    with pytest.warns(UserWarning, match="continuing at step"):
        second = fit("segment", "--trainer.max_epochs", "2", "--resume", "auto")
    assert second == first
    assert f"resumes from {first}/checkpoints/last.ckpt" in capsys.readouterr().out
    last = torch.load(first / "checkpoints/last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (1, 4)
    third = fit("segment", "--trainer.max_epochs", "1", "--resume", "auto", "--model.lr", "0.1")
    assert third != first
    assert "has other options: model.lr" in capsys.readouterr().out


def test_help_and_errors_name_the_subcommand(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["segment", "--help"])
    assert "`mobileone segment export CHECKPOINT FOLDER`" in " ".join(
        capsys.readouterr().out.split()
    )
    for words, message in (
        (["detect", "fit", "--model.modle", "x"], "mobileone detect fit: error:"),
        (["detect", "test"], "mobileone detect: error:"),
        (["segment", "fit", "--model.architecture", "unest"], "deeplabv3, unet"),
        (["segment", "fit", "--model.model", "mobileone_s9"], "mobileone_s9"),
        (["segment", "validate"], "--ckpt_path is needed"),
        (["detect", "export", "none.ckpt", "out"], "no checkpoint at none.ckpt"),
    ):
        assert message in error_of(capsys, *words)


def test_a_checkpoint_of_another_task_is_refused(capsys):
    folder = fit("segment", "--trainer.max_epochs", "1")
    checkpoint = str(folder / "checkpoints/last.ckpt")
    said = error_of(capsys, "detect", "validate", "--ckpt_path", checkpoint)
    assert "is not of `mobileone detect fit`" in said
    said = error_of(capsys, "detect", "export", checkpoint, "out")
    assert "is not a checkpoint of a Detector" in said
    assert not Path("out").exists()
