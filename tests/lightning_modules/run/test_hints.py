"""Hints at the start of a fit, and when there is none."""

from types import SimpleNamespace

import pytest
import yaml

from callbacks.ema import EMA
from lightning_modules.cli.main import main
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.hints import Hints
from tests.helpers.command import FIT
from tests.helpers.images import write_images
from tests.helpers.paths import REPOSITORY
from tests.helpers.trainer import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tiny trainings

PETS = {"cat": 8, "dog": 8}


@pytest.fixture
def hints(tmp_path, capsys):
    """The lines of a fit of two steps: hints(ema, data={...}, trainer={...}, lr=0.001)."""

    def run(ema=None, classes=PETS, data=None, trainer=None, **model):
        root = write_images(tmp_path / "images", {"train": classes, "val": classes})
        options = {"batch_size": 8, "input_size": 32, "num_workers": 0, **(data or {})}
        module = ImageClassifier("test_byobnet", num_classes=len(classes), **{"lr": 0.001, **model})
        callbacks = (ema or EMA(), Hints())
        make_trainer(tmp_path, *callbacks, **(trainer or {})).fit(
            module, ImageDataModule(str(root), **options)
        )
        return [line for line in capsys.readouterr().out.splitlines() if line[:5] == "hint:"]

    return run


def test_nothing_is_said_of_a_choice_that_suits(hints):
    assert hints() == []


@pytest.mark.parametrize(
    "model",
    [
        {"lr": 0.0031},  # a batch of eight at the paper's rate for 256
        {"lr": 0.1, "warmup_epochs": 0.5},
        {"lr": 0.1, "lr_reference_batch": 256},
        {"lr": 0.1, "optimizer": "adamw"},  # whose rates mean something else
    ],
)
def test_nothing_is_said_of_a_rate_that_suits(hints, model):
    assert hints(**model) == []


def test_a_rate_for_larger_batches(hints):
    (line,) = hints(lr=0.1)
    assert "learning rate 0.1 is high for batches of 8" in line
    assert hints(lr=0.1, trainer={"accumulate_grad_batches": 16}) == []


def test_an_average_of_the_first_weights(hints):
    ema = EMA(0.5, warmup=False)  # 0.5 ** 3 = 0.125, 0.5 ** 4 = 0.06
    (line,) = hints(ema, trainer={"max_steps": 3, "max_epochs": -1})
    assert "after all 3 steps the average of the weights still holds 12% of the first" in line
    assert hints(EMA(0.5, warmup=False), trainer={"max_steps": 4, "max_epochs": -1}) == []


def test_raw_weights_or_a_warmup_forget_the_first(hints):
    assert hints(EMA(0.9995, warmup=False, validate="raw")) == []
    assert hints(EMA(0.9995)) == []


def test_images_smaller_than_the_stride(hints):
    (line,) = hints(data={"input_size": 24})
    assert "images of 24 pixels" in line
    assert "stride, 32: --data.input_size 64" in line


def test_one_class(hints):
    (line,) = hints(classes={"cat": 16})
    assert "'cat' is the only class" in line


def test_a_try_of_the_code_says_nothing(hints):
    assert hints(lr=0.1, trainer={"fast_dev_run": True}) == []


def test_the_command_prints_a_hint_once(here, capsys):
    main([*FIT, "--model.lr", "0.1", "--trainer.max_epochs", "1"])
    assert capsys.readouterr().out.count("hint: ") == 1


@pytest.mark.parametrize(
    ("recipe", "devices", "images"),
    [("quickstart", 1, 1437), ("finetune", 1, 6400), ("imagenet/base", 8, 1_281_167)],
)
def test_a_recipe_has_none(recipe, devices, images, capsys):
    told = yaml.safe_load((REPOSITORY / f"configs/{recipe}.yaml").read_text())
    names = ("lr", "warmup_epochs", "optimizer")
    chosen = {name: told["model"][name] for name in names if name in told["model"]}
    module = ImageClassifier("test_byobnet", num_classes=10, **chosen)
    size, batch = told["data"].get("input_size", 224), told["data"]["batch_size"]
    trainer = SimpleNamespace(
        fast_dev_run=False,
        datamodule=SimpleNamespace(
            class_names="0123456789", data_config={"input_size": (3, size, size)}
        ),
        callbacks=[EMA(**told["ema"])],
        train_dataloader=SimpleNamespace(batch_size=batch),
        world_size=devices,
        accumulate_grad_batches=1,
        estimated_stepping_batches=told["trainer"]["max_epochs"] * (images // (devices * batch)),
    )
    Hints().on_train_start(trainer, module)
    assert capsys.readouterr().out == ""
    module.hparams.update(lr=1.0, warmup_epochs=0)  # what the test would see
    Hints().on_train_start(trainer, module)
    assert "learning rate 1 is high" in capsys.readouterr().out
