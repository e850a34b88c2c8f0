"""`mobileone segment` and `mobileone detect`: fit, validate, and export of a checkpoint."""

import sys
import warnings
from pathlib import Path

from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules.answers import fail
from lightning_modules.config_files import find_configs
from lightning_modules.dense.data import DetectionData, SegmentationData
from lightning_modules.dense.export import export_detector, export_segmenter
from lightning_modules.dense.models import Detector, Segmenter
from lightning_modules.errors import message_for_user
from lightning_modules.quiet import silence_known_messages

__all__ = ["run"]

_EXPECTED = (
    "LightningCLI's args parameter is intended",  # the command line starts with our subcommand
    "Starting from v1.9.0, `tensorboardX`",  # the CSV logger is meant
    "The dirpath has changed from",  # each run has a folder of its own
)

_TASKS = {
    "segment": (Segmenter, SegmentationData, export_segmenter),
    "detect": (Detector, DetectionData, export_detector),
}


def run(name: str, argv: list[str]) -> None:
    """Run `mobileone segment` or `mobileone detect`.

    Raises:
        SystemExit: With code 2 on arguments or data that cannot be used.
    """
    silence_known_messages()
    try:
        if argv[:1] == ["export"]:
            _export(name, argv[1:])
        else:
            _train(name, find_configs(argv))
    except Exception as error:
        if (message := message_for_user(error)) is None:
            raise
        fail(name, message)


class _DenseCLI(LightningCLI):
    """fit and validate; the classes come from the data."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that make sense here."""
        names = LightningCLI.subcommands()
        return {name: names[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what model and data share."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        monitor = "val/miou" if self.datamodule_class is SegmentationData else "val/map"
        parser.set_defaults(
            {
                "checkpoint.monitor": monitor,
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        if self.datamodule_class is SegmentationData:
            parser.link_arguments("model.model", "data.model")

    def after_fit(self) -> None:
        """Say how good the best model is, and where it lies."""
        saver = self.trainer.checkpoint_callback
        if isinstance(saver, ModelCheckpoint) and saver.best_model_score is not None:
            score = float(saver.best_model_score)
            print(f"{saver.monitor} {score:.4f}: {saver.best_model_path}")


def _train(name: str, argv: list[str]) -> None:
    model, data, _ = _TASKS[name]
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    before = sys.argv
    # a distributed strategy starts its other processes with this command line
    sys.argv = [before[0], name, *argv]
    try:
        _DenseCLI(
            model,
            data,
            args=argv,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"max_epochs": 50, "enable_model_summary": False},
            parser_kwargs={"prog": f"mobileone {name}"},
            save_config_kwargs={"overwrite": True},
        )
    finally:
        sys.argv = before


def _export(name: str, argv: list[str]) -> None:
    function = _TASKS[name][2]
    parser = ArgumentParser(
        prog=f"mobileone {name} export",
        description="Write the fused network of a checkpoint. "
        f"Example: mobileone {name} export runs/{name}/last.ckpt shipped/",
    )
    parser.add_function_arguments(function, as_positional=True, as_group=False)
    options = parser.parse_args(argv)
    files = function(**options.as_dict())
    print(f"{', '.join(file.name for file in files)} -> {Path(options.directory)}")
