"""Every recipe that ships is found, parsed and run for a batch."""

from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
import yaml

from callbacks.curriculum import Curriculum
from lightning_modules.cli.main import main
from lightning_modules.run.config_files import find_configs, option_value, packaged_configs
from tests.helpers.images import write_images

ROOT = Path(str(files("configs")))
RECIPES = sorted(  # those of `mobileone fit`; the others are in tests/dense
    p.relative_to(ROOT).as_posix()
    for p in ROOT.rglob("*.yaml")
    if p.parent.name != "dense" and p.name != "sweep.yaml"
)
SMALL = ["--data.input_size", "32", "--data.batch_size", "4", "--data.num_workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageFolder of two classes."""
    four = {"cat": 4, "dog": 4}
    splits = {"train": four, "val": four}
    return write_images(tmp_path_factory.mktemp("images"), splits, (40, 36))


def test_all_recipes_are_known():
    assert len(RECIPES) == 11
    packaged = {f"{name}.yaml" for name in packaged_configs() if not name.startswith("dense/")}
    assert packaged == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_header_gives_command_expectation_and_hardware(recipe):
    header = [line for line in (ROOT / recipe).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "mobileone fit --config" in text
    assert f"configs/{recipe}" in text
    assert "Hardware:" in text
    assert recipe == "imagenet/base.yaml" or "Expected:" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_for_a_batch(recipe, images, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    below = {"imagenet/fast.yaml": ["base", "s0"], "imagenet/distill.yaml": ["base", "s1"]}
    parts = below.get(recipe, ["base"] if "imagenet/s" in recipe else [])
    base = [word for part in parts for word in ("--config", str(ROOT / f"imagenet/{part}.yaml"))]
    own = [] if recipe == "quickstart.yaml" else ["--data.root", str(images)]
    offline = ["--model.pretrained", "false"] if recipe == "finetune.yaml" else []
    if recipe == "imagenet/distill.yaml":
        torch.save(timm.create_model("test_byobnet", num_classes=2).state_dict(), "teacher.pth")
        offline = "--model.teacher test_byobnet --model.teacher_weights teacher.pth".split()
    if recipe == "quantize.yaml":
        torch.save(timm.create_model("mobileone_s0", num_classes=2).state_dict(), "float.pth")
        offline = ["--model.weights", "float.pth"]
    trainer = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    main(["fit", *base, "--config", str(ROOT / recipe), *own, *offline, *SMALL, *trainer])


def paper_recipe():
    return yaml.safe_load((ROOT / "imagenet/base.yaml").read_text())


def test_imagenet_recipe_is_the_papers():
    """Section 4.1 of the paper, as read by the author of this test."""
    recipe = paper_recipe()
    model, data = recipe["model"], recipe["data"]
    assert (model["optimizer"], model["lr"], model["momentum"]) == ("momentum", 0.1, 0.9)
    assert (model["weight_decay"], model["weight_decay_end"]) == (1e-4, 1e-5)
    assert model["label_smoothing"] == 0.1
    assert recipe["trainer"]["max_epochs"] == 300
    assert recipe["ema"]["decay"] == 0.9995
    assert data["batch_size"] * 8 == 256
    assert data["input_size"] == 224
    assert recipe["ema"]["warmup"] is False
    assert (model["warmup_epochs"], model["no_decay_norm_bias"]) == (0, False)


def test_image_size_and_augmentation_rise_as_in_the_reproductions():
    """Epochs 0-38, 39-113 and 114-299; as the callback reads them."""
    curriculum = Curriculum(**paper_recipe()["curriculum"])
    phases = curriculum.scaled(300)
    assert phases == [(0, 160, 0.3), (39, 192, 0.7), (114, 224, 1.0)]
    assert curriculum.epochs == 300


def test_fast_is_a_third_with_a_scaled_and_warmed_up_learning_rate():
    fast = yaml.safe_load((ROOT / "imagenet/fast.yaml").read_text())
    assert fast["trainer"] == {"max_epochs": 100}
    model = {"lr": 0.1, "lr_reference_batch": 256, "warmup_epochs": 5}
    assert (fast["model"], fast["data"]) == (model, {"batch_size": 128})
    scaled = Curriculum(**paper_recipe()["curriculum"]).scaled(100)
    assert [start for start, _, _ in scaled] == [0, 13, 38]


def test_distillation_is_meal_v2s():
    """arXiv 2009.08453: the teacher's probabilities alone, at temperature 1."""
    distill = yaml.safe_load((ROOT / "imagenet/distill.yaml").read_text())
    model = distill.pop("model")
    assert distill == {}
    assert (model["distill_weight"], model["distill_temperature"]) == (1.0, 1.0)
    assert timm.is_model(model["teacher"].partition(".")[0])
    assert model["teacher_weights"] is None


@pytest.mark.parametrize("name", ["s0", "s1", "s2", "s3", "s4"])
def test_imagenet_variants_differ_where_the_paper_does(name):
    recipe = yaml.safe_load((ROOT / f"imagenet/{name}.yaml").read_text())
    assert recipe["model"] == {"model": f"mobileone_{name}"}
    expected = {"crop_pct": 0.875 if name == "s0" else 0.9}  # of the published weights, in timm
    if name in ("s2", "s3", "s4"):
        expected["auto_augment"] = "original"
    assert recipe["data"] == expected
    assert timm.get_pretrained_cfg(f"mobileone_{name}.apple_in1k").crop_pct == expected["crop_pct"]


def test_packaged_recipe_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = str(ROOT / "imagenet/s0.yaml")
    for spelling in ("imagenet/s0", "imagenet/s0.yaml", "configs/imagenet/s0.yaml"):
        assert find_configs(["--config", spelling]) == ["--config", expected]
        assert find_configs([f"-c={spelling}"]) == [f"-c={expected}"]


def test_own_file_comes_before_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("seed_everything: 1")
    argv = ["--config", "quickstart.yaml", "--data.root", "quickstart"]
    assert find_configs(argv) == argv


def test_option_value_takes_the_last_spelling():
    argv = ["--config", "a", "-c=b", "--other", "c"]
    assert option_value(argv, "--config", "-c") == "b"
    assert option_value(argv, "--missing") is None


def test_the_command_line_counts_wherever_its_words_are():
    """Else the `ckpt_path: null` of a run's configuration would undo a flag before it."""
    argv = ["--ckpt_path", "x.ckpt", "--config", "mine.yaml", "--model.lr=1", "-c=other.yaml"]
    assert find_configs(argv) == [
        *("--config", "mine.yaml", "-c=other.yaml"),
        *("--ckpt_path", "x.ckpt", "--model.lr=1"),
    ]
    assert find_configs(["--config"]) == ["--config"]  # the parser says what is missing
