"""The configuration that came with a checkpoint imports nothing of its sender's choice."""

import pytest
import torch
import yaml

from lightning_modules.cli.main import main
from lightning_modules.errors import UsageError
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.checkpoint_args import (
    check_run_config,
    hyper_parameters,
    prepend_run_config,
)
from tests.helpers.command import FIT, error_of
from tests.helpers.fetching import fetching

EVIL = {"class_path": "evil.Callback"}
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"
LAMBDA = {
    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
    "init_args": {"on_fit_start": "os.abort"},
}
GOOD = {
    "class_path": "lightning.pytorch.callbacks.Timer",
    "init_args": {"duration": "00:12:00:00", "interval": "step"},
}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"trainer": {"callbacks": [GOOD, EVIL]}}, "evil.Callback"),
        ({"trainer": {"callbacks": LAMBDA}}, "os.abort"),
        ({"trainer": {"callbacks": "callbacks.yaml"}}, "callbacks.yaml"),
        ({"trainer": {"logger": "evil.Logger"}}, "evil.Logger"),
        ({"trainer": {"strategy": {"class_path": "evil.S"}}}, "evil.S"),
        ({"trainer": "other.yaml"}, "other.yaml"),
        ({"config": "other.yaml"}, "other.yaml"),
        ({"imports": ["evil"]}, "evil"),
        ({"model": {"class_path": "evil.Model"}}, "evil.Model"),
        ({"model": "evil.Model"}, "evil.Model"),
        ({"data": {"class_path": "evil.Data", "init_args": {}}}, "evil.Data"),
        ({"data": {"dataset": "evil:split"}}, "evil:split"),
        ({"data": {"init_args": {"dataset": "evil:split"}}}, "evil:split"),
        ({"data": {"dataset": "evil:split", "init_args": {}}}, "evil:split"),
        ({"data": {"init_args": {}, "dict_kwargs": {"dataset": "evil:split"}}}, "dict_kwargs"),
        ({"data": {"init_args.dataset": "evil:split"}}, r"init_args\.dataset"),
        ({"data.dataset": "evil:split"}, r"data\.dataset"),
        ({"model.class_path": "evil.Model"}, r"model\.class_path"),
        ({"trainer.logger": "evil.Logger"}, r"trainer\.logger"),
        ({"trainer": {"callbacks+": ["evil.Callback"]}}, r"callbacks\+"),
        ({"trainer": {"callbacks": [["evil.Callback"]]}}, "evil.Callback"),
        ({"imports+": ["evil"]}, r"imports\+"),
        ({"ema": "other.yaml"}, "other.yaml"),
        ({"data": {"dataset": "hfds/sender/images"}}, "hfds/sender/images"),
        ({"model": {"teacher": "hf-hub:sender/net"}}, "hf-hub:sender/net"),
        ({"model": {"model_kwargs": {"cache_dir": "x"}}}, "model_kwargs"),
        ({"model": {"init_args": {"model_kwargs": {"a": "file:x"}}}}, "model_kwargs"),
        ({"checkpoint": {"filename": "../../{step}"}}, r"\.\./\.\./{step}"),
        (
            {"trainer": {"callbacks": {"class_path": SAVER, "init_args": {"dirpath": "/etc"}}}},
            "/etc",
        ),
    ],
)
def test_foreign_classes_are_refused(tmp_path, values, named):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=rf"names '{named}' to be .* --config .*config\.yaml"):
        check_run_config(path)


def test_values_and_lightnings_classes_are_taken(tmp_path):
    path = tmp_path / "config.yaml"
    trainer = {"callbacks": [GOOD], "strategy": "ddp", "logger": None, "max_epochs": 3}
    path.write_text(yaml.safe_dump({"trainer": trainer, "data": {"root": "a/b.c"}}))
    check_run_config(path)
    ours = {
        "class_path": "lightning_modules.ImageClassifier",
        "init_args": {"freeze": ["stages.0"]},
    }
    data = {"init_args": {"dataset": "torch/cifar10", "model": "mobileone_s1.apple_in1k"}}
    path.write_text(yaml.safe_dump({"model": ours, "data": data, "imports": []}))
    check_run_config(path)
    for damaged in ("a: [", "[" * 10_000):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="cannot be read"):
            check_run_config(path)


def test_where_a_run_writes_is_not_taken_and_nothing_is_fetched(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text('{"wandb_id": "x"}')
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}
    values = {
        "trainer": {"logger": logger, "default_root_dir": "/x", "max_epochs": 3, "profiler": None},
        "wandb": {"mode": "online", "entity": "sender", "project": "mobileone", "tags": None},
        "checkpoint": {"dirpath": "/x", "filename": "{step}"},
        "model": {"model": "hf-hub:sender/resnet18.a1_in1k", "pretrained": True, "lr": 0.5},
        "data": {"init_args": {"download": True, "root": "data/pets"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    given = ["--ckpt_path", str(folder / "checkpoints/x.ckpt")]
    replaced = [
        *("--trainer.logger=null", "--trainer.default_root_dir=null", "--checkpoint.dirpath=null"),
        *("--model.pretrained=false", "--data.download=false"),
        *("--wandb.mode=offline", "--wandb.entity=null", "--model.model=resnet18.a1_in1k"),
    ]
    config = str(folder / "config.yaml")
    assert prepend_run_config(given, all_data=False) == ["--config", config, *replaced, *given]
    assert "--wandb.mode" in capsys.readouterr().err
    trusted = ["--config", config, *given]
    assert prepend_run_config(trusted, all_data=False) == trusted


def test_the_parser_takes_what_stands_in_place(tmp_path, monkeypatch):
    """Through the command itself: the logger of the file is not made, its values are used."""
    monkeypatch.chdir(tmp_path)
    main([*FIT, "--run.root", str(tmp_path / "runs"), "--trainer.max_epochs", "1"])
    (checkpoint,) = (tmp_path / "runs").glob("*/2*/checkpoints/epoch*.ckpt")
    config = checkpoint.parents[1] / "config.yaml"
    values = yaml.safe_load(config.read_text())
    elsewhere = tmp_path / "elsewhere"
    values["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "elsewhere"},
    }
    values["trainer"]["default_root_dir"] = str(elsewhere)
    folder, served = fetching(tmp_path)
    config.write_text(yaml.safe_dump(values))
    main(["validate", "--ckpt_path", str(checkpoint)])
    assert not elsewhere.exists()

    contents = torch.load(checkpoint, weights_only=True)
    contents["hyper_parameters"]["model_kwargs"] = served
    alone = tmp_path / "alone.ckpt"
    torch.save(contents, alone)
    data = ["--data.dataset", "digits", "--data.input_size", "32", "--data.batch_size", "8"]
    main(["validate", "--ckpt_path", str(alone), *data, "--wandb.mode", "disabled"])
    assert not folder.exists()


def test_the_command_asks_for_the_configuration(tmp_path, capsys):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}}, tmp_path / "run/checkpoints/x.ckpt")
    (tmp_path / "run/run.json").write_text('{"wandb_id": "x"}')
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [EVIL]}}))
    said = error_of(capsys, "fit", "--ckpt_path", tmp_path / "run/checkpoints/x.ckpt")
    assert "names 'evil.Callback' to be imported and run, read or fetched: refused" in said


def test_hyper_parameters_of_a_checkpoint_import_nothing(tmp_path):
    """jsonargparse would resolve a class path in any dictionary."""
    path = tmp_path / "x.ckpt"
    arguments = {"model": "mobileone_s0", "model_kwargs": {"block_args": {"class_path": "evil.C"}}}
    torch.save({"state_dict": {}, "hyper_parameters": arguments}, path)
    with pytest.raises(
        UsageError, match=r"x\.ckpt names 'evil\.C' to be imported and run: refused"
    ):
        hyper_parameters(str(path), None, ImageClassifier, "mobileone fit")


def test_a_process_that_a_resuming_run_starts_has_that_commands_options(tmp_path):
    """Not those of the earlier run, which may name modules or an older length."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text('{"wandb_id": "x"}')
    (tmp_path / "config.yaml").write_text("imports: [mine]")
    found = ["--resume", "never", "--ckpt_path", str(tmp_path / "checkpoints/last.ckpt")]
    child = ["--imports", "[mine]", "--resume", "auto", *found]
    assert prepend_run_config(child, all_data=False) == child
    with pytest.raises(ValueError, match="names 'mine'"):
        prepend_run_config(found, all_data=False)
    config = ["--config", str(tmp_path / "config.yaml")]
    named = ["--imports", "[other,mine]", *found]  # by the user, so that it may be imported
    assert prepend_run_config(named, all_data=False) == [*config, *named]
    with pytest.raises(ValueError, match="names 'mine'"):
        prepend_run_config(["--imports", "other", *found], all_data=False)
