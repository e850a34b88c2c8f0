"""Every recipe that ships is found, parsed and run for a batch."""

from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from lightning_modules.cli import main
from lightning_modules.config_files import find_configs, option_value, packaged_configs

ROOT = Path(str(files("configs")))
RECIPES = sorted(  # those of `mobileone fit`; the others are in tests/dense
    p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.yaml") if p.parent.name != "dense"
)
SMALL = ["--data.input_size", "32", "--data.batch_size", "4", "--data.num_workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageFolder of two classes."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 36), (90 * label, 60 * i, 120)).save(folder / f"{i}.png")
    return root


def test_all_recipes_are_known():
    assert len(RECIPES) == 10
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
    monkeypatch.setenv("MOBILEONE_CACHE", str(tmp_path / "cache"))
    below = {"imagenet/fast.yaml": ["base", "s0"], "imagenet/distill.yaml": ["base", "s1"]}
    parts = below.get(recipe, ["base"] if "imagenet/s" in recipe else [])
    base = [word for part in parts for word in ("--config", str(ROOT / f"imagenet/{part}.yaml"))]
    own = [] if recipe == "quickstart.yaml" else ["--data.root", str(images)]
    offline = ["--model.pretrained", "false"] if recipe == "finetune.yaml" else []
    if recipe == "imagenet/distill.yaml":
        torch.save(timm.create_model("test_byobnet", num_classes=2).state_dict(), "teacher.pth")
        offline = "--model.teacher test_byobnet --model.teacher_weights teacher.pth".split()
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


@pytest.mark.parametrize("name", ["s0", "s1", "s2", "s3", "s4"])
def test_imagenet_variants_differ_where_the_paper_does(name):
    recipe = {**yaml.safe_load((ROOT / f"imagenet/{name}.yaml").read_text())}
    assert recipe["model"]["model"] == f"mobileone_{name}"
    augmented = "auto_augment" in recipe["data"]
    assert augmented == (name in ("s2", "s3", "s4"))


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
