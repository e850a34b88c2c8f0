"""`mobileone segment` and `mobileone detect`: fit and validate."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.progress import four_digits
from lightning_modules.data.protocol import num_classes
from lightning_modules.dense.data import DetectionData, SegmentationData
from lightning_modules.dense.models import Detector, Segmenter
from lightning_modules.dense.saving import CompleteCheckpoint, SoleRun
from lightning_modules.run import fit as training

__all__ = ["run"]

_EXPORT = "`mobileone {} export CHECKPOINT FOLDER` writes a checkpoint's fused network."


class _DenseCLI(training.TrainingCLI):
    """`mobileone fit` with another model, other data, and checkpoints without artifacts."""

    monitor: str
    count_classes = staticmethod(num_classes)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that make sense here."""
        names = training.TrainingCLI.subcommands()
        return {name: names[name] for name in ("fit", "validate")}

    def add_task_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the best checkpoint's section; the run is called after the task."""
        parser.add_lightning_class_args(CompleteCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": self.monitor,
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "run.name": self.program.split()[-1],
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Keep the last checkpoint next to the best, in a folder that nobody else writes to."""
        trainer = super().instantiate_trainer(**kwargs)
        if self.run is None:
            return trainer
        here = self.run.checkpoints  # where resuming looks
        last = CompleteCheckpoint(str(here), "last", enable_version_counter=False)
        more: list[Callback] = [last]  # saved after the best, it knows of it
        if self.subcommand == "fit":
            more.append(SoleRun(here, Path(self._get(self.config_init, "checkpoint").dirpath)))
        trainer.callbacks += more  # type: ignore[attr-defined]
        return trainer

    def _input_size(self) -> str:
        return str(self.model.hparams.get("size", self.datamodule.size))

    @rank_zero_only
    def after_fit(self) -> None:
        """Print how good the best model is, and where it is."""
        saver = self.trainer.checkpoint_callback
        if isinstance(saver, ModelCheckpoint) and saver.best_model_score is not None:
            score = four_digits(float(saver.best_model_score))
            print(f"{saver.monitor} {score}: {saver.best_model_path}")
            print(f"to ship it: {self.program} export {saver.best_model_path} shipped/")


class _SegmentCLI(_DenseCLI):
    model_type = model_base = Segmenter
    data_type = data_base = SegmentationData
    program, monitor = "mobileone segment", "val/miou"
    description = f"Train a segmentation network, or score one. {_EXPORT.format('segment')}"

    def add_task_arguments(self, parser: LightningArgumentParser) -> None:
        """Normalize the images as the model expects them."""
        super().add_task_arguments(parser)
        parser.link_arguments("model.init_args.model", "data.init_args.model")


class _DetectCLI(_DenseCLI):
    model_type = model_base = Detector
    data_type = data_base = DetectionData
    program, monitor = "mobileone detect", "val/map"
    description = f"Train an object detector, or score one. {_EXPORT.format('detect')}"


_TASKS: dict[str, type[_DenseCLI]] = {"segment": _SegmentCLI, "detect": _DetectCLI}


def run(name: str, argv: list[str]) -> None:
    """Run `mobileone segment` or `mobileone detect`.

    Raises:
        SystemExit: With code 2 on arguments or data that cannot be used.
    """
    subcommand, *rest = argv or ["--help"]
    training.run(subcommand, rest, _TASKS[name])
