"""The subcommands that run a Trainer: fit, validate and test, on LightningCLI."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from callbacks.curriculum import Curriculum
from callbacks.ema import EMA
from callbacks.reparameterize import ReparameterizeOnSave
from callbacks.report import Report
from lightning_modules.classifier import ImageClassifier
from lightning_modules.config_files import find_configs, option_value
from lightning_modules.data import ImageDataModule
from lightning_modules.quiet import silence_known_messages
from lightning_modules.run_folder import RunFolder
from lightning_modules.tracking import WandbOptions, make_loggers
from mobileone import reparameterize
from mobileone.export.checkpoint import read_checkpoint

__all__ = ["TrainingCLI", "run"]


def run(name: str, argv: list[str]) -> None:
    """Run `mobileone fit`, `validate` or `test`.

    A configuration is searched by file name, then among those that come with the package. Without
    one, a checkpoint in a run folder is taken with the configuration of that run.

    Args:
        name: The subcommand.
        argv: Its arguments.

    Raises:
        SystemExit: With code 2 on arguments or data that cannot be used.
    """
    silence_known_messages()
    previous = sys.argv
    try:
        argv = _with_config_of_the_run(find_configs(argv))
        # a distributed strategy starts its other processes with this command line
        sys.argv = [previous[0], name, *argv]
        TrainingCLI(
            ImageClassifier,
            ImageDataModule,
            save_config_callback=_SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # the paper's epochs; no table of modules: `before_fit` says what matters
            trainer_defaults={"max_epochs": 300, "enable_model_summary": False},
            parser_kwargs={"prog": "mobileone"},
        )
    except _UsageError as error:
        print(f"mobileone {name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.argv = previous


class _UsageError(Exception):
    """Arguments or data that cannot be used, found before any work was done."""


class _SaveConfig(SaveConfigCallback):
    """Write the configuration of a fit to `<run>/config.yaml` and to the loggers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write beside and rename, so that a resumed run never loses it."""
        if stage != "fit":
            return
        final = RunFolder.read(Path(trainer.default_root_dir)).config
        beside = final.with_suffix(".tmp")
        beside.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")
        beside.replace(final)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())


class TrainingCLI(LightningCLI):
    """LightningCLI with the template's model, data, run folder, loggers and callbacks.

    Precedence: explicit flag, configuration file, hyper-parameters of `--ckpt_path`, default.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods, without predict: a folder of images needs no Trainer."""
        names = LightningCLI.subcommands()
        return {name: names[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of callbacks, run folder and wandb, and the links."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(ReparameterizeOnSave, "checkpoint")
        parser.add_lightning_class_args(Curriculum, "curriculum")
        parser.add_lightning_class_args(Report, "report")
        parser.add_argument("--run.root", default="runs", help="folder of all runs")
        parser.add_argument(
            "--run.name",
            type=str | None,
            default=None,
            help="a run writes to <root>/<name>/<time>; null for the model's name",
        )
        parser.add_class_arguments(WandbOptions, "wandb")
        parser.link_arguments("model.model", "data.model")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the checkpoint's hyper-parameters as defaults of the model's arguments."""
        if "_ARGCOMPLETE" in os.environ:  # the shell asks; this answers and exits
            self._subcommand_parsers[sys.argv[1]].parse_args([])
        checkpoint = option_value(sys.argv, "--ckpt_path")
        if checkpoint is not None:
            known = _hyper_parameters(checkpoint)
            for subparser in self._subcommand_parsers.values():
                subparser.set_defaults({f"model.{k}": v for k, v in known.items()})
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Not as LightningCLI does, which lets the checkpoint override explicit flags."""

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, and send everything that is written there."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit" and config.ckpt_path is None and not config.model.pretrained:
            raise _UsageError(
                f"--ckpt_path is needed: there is nothing to {self.subcommand}; give a checkpoint, "
                "for example runs/quickstart/latest/checkpoints/best.ckpt, or --model.pretrained "
                "true for timm's weights"
            )
        config.weights_only = True  # a checkpoint holds tensors and primitives, nothing to run
        self.run = None
        if not config.trainer.fast_dev_run:
            self.run = self._run_folder()
            config.trainer.default_root_dir = str(self.run.path)
            config.checkpoint.dirpath = config.checkpoint.dirpath or str(self.run.checkpoints)

    def instantiate_classes(self) -> None:
        """Build everything; what is wrong with arguments or data is said in one line."""
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            raise _UsageError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the loggers, unless the configuration has its own."""
        asked = self.config[self.subcommand].trainer.logger
        if asked in (None, True):
            options = self._get(self.config_init, "wandb")
            kwargs["logger"] = make_loggers(self.run, options) if self.run is not None else False
        return super().instantiate_trainer(**kwargs)

    @rank_zero_only
    def before_fit(self) -> None:
        """Say what is trained, and where it goes."""
        network, data = self.model.model, self.datamodule.data_config
        with warnings.catch_warnings():  # it is only counted, so its mode does not matter
            warnings.simplefilter("ignore")
            folded = reparameterize(network)
        size = "×".join(str(n) for n in data["input_size"])
        print(
            f"{self.model.hparams['model']}: {_millions(network)} parameters in training, "
            f"{_millions(folded)} deployed; {self.datamodule.num_classes} classes, {size} pixels"
        )
        if self.run is not None:
            print(f"run folder: {self.run.path}")

    @rank_zero_only
    def after_fit(self) -> None:
        """Say where the results are."""
        saver = self.trainer.checkpoint_callback
        if self.run is None or not isinstance(saver, ReparameterizeOnSave):
            return
        if saver.best_model_score is not None:
            print(f"best {saver.monitor}: {saver.best_model_score:.4f}")
        for title, path in (
            ("checkpoint", saver.best_model_path),
            ("artifacts", saver.best_artifact_path),
            ("run folder", self.run.path),
        ):
            print(f"{title + ':':<12}{path}")

    def _run_folder(self) -> RunFolder:
        config = self.config[self.subcommand]
        if config.ckpt_path is not None:
            found = RunFolder.of_checkpoint(config.ckpt_path)
            if found is not None:
                return found
        return RunFolder.create(config.run.root, config.run.name or config.model.model)


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def _with_config_of_the_run(argv: list[str]) -> list[str]:
    checkpoint = option_value(argv, "--ckpt_path")
    if checkpoint is None or option_value(argv, "--config", "-c") is not None:
        return argv
    found = RunFolder.of_checkpoint(checkpoint)
    if found is None or not found.config.is_file():
        return argv
    return ["--config", str(found.config), *argv]


def _hyper_parameters(checkpoint: str) -> dict[str, Any]:
    try:
        known = read_checkpoint(Path(checkpoint)).get("hyper_parameters", {})
    except (ValueError, OSError) as error:
        raise _UsageError(str(error)) from error
    # the data say how many classes there are; the weights are the checkpoint's
    return {
        k: v for k, v in known.items() if k not in ("num_classes", "pretrained", "_instantiator")
    }
