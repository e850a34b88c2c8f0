"""Pictures and artifacts of a run: into the run folder, and to the loggers that take them."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from callbacks.artifacts.callback import ReparameterizeOnSave
from callbacks.dry_run import is_dry_run
from callbacks.report.figures import confusion_figure, curves_figure, read_curves, samples_figure
from callbacks.report.worst_images import WorstImages
from mobileone.bench.show.charts import write_figure
from mobileone.export.manifest import MANIFEST_NAME, Manifest
from mobileone.export.preprocess import denormalize
from mobileone.export.spec import ExportSpec
from mobileone.io.atomic import atomic_write

__all__ = ["Report"]


class Report(Callback):
    """Show what the model does, and hand its fused artifact to the loggers.

    After each validation: predictions on images from the complete validation set, and the images of
    highest loss. At the end of a fit: the curves of loss, accuracy, learning rate and weight
    decay. After a test: the confusion matrix, as a picture and as CSV, and the images of highest
    loss. All go to `<run>/report/` and to the loggers that take pictures. On several devices, the
    images are those of the first. wandb gets the artifact as an Artifact of type "model", with the
    manifest as its metadata; TensorBoard gets the manifest as a text.

    The LightningModule needs `export_spec` (class names, normalization), for the images of highest
    loss a `validation_step` and a `test_step` that return logits, and for the matrix
    `test_confusion`, as `ImageClassifier` has.

    Args:
        samples: Images to show after a validation, and images of highest loss; 0 for none.
        log_artifact: Which artifacts go to the loggers: the best one when the fit ends, one after
            each validation, or none.
    """

    def __init__(
        self, samples: int = 16, log_artifact: Literal["best", "every", "none"] = "best"
    ) -> None:
        if samples < 0:
            raise ValueError(f"`samples` (={samples}) must be at least 0")
        if log_artifact not in ("best", "every", "none"):
            raise ValueError(f"`log_artifact` (={log_artifact!r}) must be best, every or none")
        self.samples = samples
        self.log_artifact = log_artifact
        self._shown: list[tuple[Tensor, Tensor, Tensor]] = []
        self._worst = WorstImages(samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to every artifact, if every one is to be logged."""
        saver = trainer.checkpoint_callback
        if stage != "fit" or not isinstance(saver, ReparameterizeOnSave):
            return
        if self.log_artifact == "every":
            saver.listeners.append(
                lambda path, manifest: _log_artifact(
                    trainer.loggers, path, manifest, ["latest"], trainer.global_step
                )
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new collection of samples."""
        self._shown = []
        self._worst = WorstImages(self.samples)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new collection of the images of highest loss."""
        self._worst = WorstImages(self.samples)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict some images, by the very weights that are validated.

        They come from all batches alike: validation sets are sorted by class.
        """
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._look(outputs, batch)
        due = self._due(batch_idx, sum(trainer.num_val_batches))
        if due:
            images, targets = (x[:: max(1, len(x) // due)][:due] for x in batch)
            with torch.no_grad():
                probabilities = pl_module(images).float().softmax(dim=1)
            self._shown.append((images.float().cpu(), targets.cpu(), probabilities.cpu()))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look for images of high loss."""
        if trainer.is_global_zero:
            self._look(outputs, batch)

    def _look(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> None:
        if self.samples and isinstance(outputs, Tensor):
            self._worst.add(*batch, outputs)

    def _due(self, batch_idx: int, batches: float) -> int:
        """How many samples this batch gives; a stream of unknown length gives one a batch."""
        if math.isinf(batches):
            return int(batch_idx < self.samples)
        return int(self.samples * (batch_idx + 1) // batches - self.samples * batch_idx // batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the samples and the images of highest loss."""
        _publish_worst(trainer, "worst", self._worst, pl_module)
        if not self._shown:
            return
        images, targets, probabilities = map(torch.cat, zip(*self._shown, strict=True))
        spec = cast(ExportSpec, pl_module.export_spec)
        _publish(trainer, "samples", _samples(images, targets, probabilities, spec))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the confusion matrix of the test and the images of highest loss."""
        _publish_worst(trainer, "worst_test", self._worst, pl_module)
        confusion = cast(Tensor | None, getattr(pl_module, "test_confusion", None))
        if confusion is None or not trainer.is_global_zero:
            return
        names = cast(ExportSpec, pl_module.export_spec).class_names
        _publish(trainer, "confusion_matrix", confusion_figure(confusion, names))
        if not is_dry_run(trainer):
            _write_matrix(_folder(trainer) / "confusion_matrix.csv", confusion, names)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves, over all resumes, and log the best artifact."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.save()
                    _publish(trainer, "curves", curves_figure(read_curves(logger.root_dir)))
        saver = trainer.checkpoint_callback
        if self.log_artifact != "best" or not isinstance(saver, ReparameterizeOnSave):
            return
        path = saver.best_artifact_path
        if path is not None and trainer.is_global_zero:
            manifest, aliases = Manifest.load(path), ["best", "latest"]
            _log_artifact(trainer.loggers, path, manifest, aliases, trainer.global_step)


def _folder(trainer: Trainer) -> Path:
    folder = Path(trainer.default_root_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(trainer: Trainer, name: str, figure: Figure) -> None:
    if is_dry_run(trainer):
        return
    final = _folder(trainer) / f"{name}.png"
    with atomic_write(final) as temporary:
        write_figure(figure, temporary)
    _log_picture(trainer.loggers, f"report/{name}", final, trainer.global_step)


def _publish_worst(
    trainer: Trainer, name: str, worst: WorstImages, pl_module: LightningModule
) -> None:
    found = worst.found()
    if found is None or is_dry_run(trainer):
        return
    _publish(trainer, name, _samples(*found[1:], cast(ExportSpec, pl_module.export_spec)))


def _samples(images: Tensor, targets: Tensor, probabilities: Tensor, spec: ExportSpec) -> Figure:
    """Normalized images (N, C, H, W), drawn with what is predicted of them."""
    pixels = denormalize(images, spec) / 255
    return samples_figure(pixels, targets, probabilities, spec.class_names)


def _write_matrix(path: Path, confusion: Tensor, names: tuple[str, ...]) -> None:
    with (
        atomic_write(path) as tmp_path,
        tmp_path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        for name, row in zip(names, confusion.tolist(), strict=True):
            writer.writerow([name, *row])


# -- Loggers, each as far as it can take what there is --------------------------------------------


def _log_picture(loggers: Sequence[Logger], name: str, file: Path, step: int) -> None:
    """Show a picture wherever it can be shown; the file stays in the run folder in any case.

    | logger | how |
    |---|---|
    | has `log_image(key, images, step)`, as WandbLogger | the file |
    | its `experiment` has `add_image`, as TensorBoard's writer | the pixels |
    | its `experiment` has `log_image`, as Comet's | the file |
    | its `experiment` has `log_artifact`, as MLflow's client | the file, as a file of the run |
    | any other | not at all |

    A logger that raises is warned of, and the training continues.

    Args:
        loggers: those of the trainer.
        name: `report/<picture>`.
        file: the picture, RGB.
        step: optimizer steps so far.
    """
    for logger in loggers:
        try:
            _show(logger, name, file, step)
        except Exception as error:  # whatever a logger's service raises
            rank_zero_warn(f"{type(logger).__name__} did not take {name}: {error}")


def _show(logger: Logger, name: str, file: Path, step: int) -> None:
    if callable(log_image := getattr(logger, "log_image", None)):
        log_image(name, [str(file)], step=step)
    elif callable(add_image := _writer(logger, "add_image")):
        with Image.open(file) as picture:
            add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    elif callable(log_image := _writer(logger, "log_image")):
        log_image(str(file), name=name, step=step)
    elif callable(log_file := _writer(logger, "log_artifact")):
        log_file(getattr(logger, "run_id", None), str(file), name)


@rank_zero_only
def _log_artifact(
    loggers: Sequence[Logger], path: Path, manifest: Manifest, aliases: list[str], step: int
) -> None:
    """Hand a fused artifact to wandb as a file, and its manifest to TensorBoard as a text.

    Args:
        loggers: those of the trainer.
        path: folder of the artifact.
        manifest: what it says of itself.
        aliases: names that wandb moves to it, for example `best`.
        step: optimizer steps so far.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger, path, manifest, aliases)
        elif callable(add_text := _writer(logger, "add_text")):
            text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
            lines = [f"{path.resolve()}", *text.splitlines()]
            add_text(f"artifact/{'-'.join(aliases)}", "\n".join(f"    {x}" for x in lines), step)


def _log_to_wandb(logger: WandbLogger, path: Path, manifest: Manifest, aliases: list[str]) -> None:
    import wandb

    name = f"{manifest.spec.model_name}-{logger.experiment.id}".replace("/", "-")
    artifact = wandb.Artifact(
        name, type="model", metadata=json.loads((path / MANIFEST_NAME).read_text())
    )
    artifact.add_dir(str(path))
    try:
        logger.experiment.log_artifact(artifact, aliases=aliases)
    except Exception as error:  # online it asks the server, and fails without a connection
        rank_zero_warn(
            f"wandb did not take the artifact ({type(error).__name__}). To send it later: "
            f"wandb artifact put --type model --name {logger.name}/{name} {path}"
        )


def _writer(logger: Logger, method: str) -> Any:
    """A method of the object behind a logger, or None; a CSV file takes numbers only."""
    experiment: Any = getattr(logger, "experiment", None)
    return None if isinstance(logger, CSVLogger) else getattr(experiment, method, None)
