"""Pictures and artifacts to the loggers of a run, each as far as the logger can take them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from PIL import Image

from mobileone.export.manifest import MANIFEST_NAME, Manifest

__all__ = ["log_artifact", "log_picture"]


def log_picture(loggers: Sequence[Logger], name: str, file: Path, step: int) -> None:
    """Show a picture wherever it can be shown; the file stays in the run folder in any case.

    | logger | how |
    |---|---|
    | has `log_image(key, images, step)`, as WandbLogger | the file |
    | its `experiment` has `add_image`, as TensorBoard's writer | the pixels |
    | any other | not at all |

    Args:
        loggers: those of the trainer.
        name: `report/<picture>`.
        file: the picture, RGB.
        step: optimizer steps so far.
    """
    for logger in loggers:
        if callable(log_image := getattr(logger, "log_image", None)):
            log_image(name, [str(file)], step=step)
        elif callable(add_image := _writer(logger, "add_image")):
            with Image.open(file) as picture:
                add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


@rank_zero_only
def log_artifact(
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
