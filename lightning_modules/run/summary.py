"""The table at the end of a run: how good, how large, how faithful, and where."""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from rich.markup import escape
from rich.table import Table

from callbacks.artifacts.callback import ReparameterizeOnSave
from callbacks.artifacts.folder import CheckpointFolder
from callbacks.progress import four_digits
from mobileone.export.manifest import Manifest

__all__ = ["evaluation_summary", "fit_summary"]


def fit_summary(saver: ReparameterizeOnSave, run: Path) -> Table:
    """Describe the best checkpoint and its artifact.

    Args:
        saver: The callback that wrote them.
        run: The run folder.

    Returns:
        A table for the terminal.
    """
    table = Table(show_header=False, title="best model of this run")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if saver.best_model_score is not None:
        table.add_row(str(saver.monitor), four_digits(float(saver.best_model_score)))
    table.add_row("run folder", escape(_short(run)))
    best = saver.best_model_path
    table.add_row("checkpoint", escape(_within(run, Path(best))) if best else "none")
    if not best:
        return table
    folder, artifact = CheckpointFolder(Path(best).parent), CheckpointFolder.artifact_of(best)
    if folder.has_artifact(best):
        table.add_row("artifact", escape(_within(run, artifact)))
        for name, text in Manifest.load(artifact).described().items():
            table.add_row(f"  {name}", escape(text))
        return table
    table.add_row("artifact", escape(f"none of this checkpoint: {folder.why_missing(best)}"))
    if (older := saver.best_artifact_path) is not None:
        table.add_row("best/", f"still the artifact of {older.name}.ckpt, another checkpoint")
    return table


def evaluation_summary(trainer: Trainer, stage: str) -> Table:
    """Describe what `validate` or `test` has measured, and of which images.

    Args:
        trainer: When it is done.
        stage: `validate` or `test`.

    Returns:
        A table for the terminal.
    """
    no_test = stage == "test" and getattr(cast(Any, trainer).datamodule, "tests_validation", False)
    images = "those of the validation: there is no test split" if no_test else f"to {stage}"
    table = Table(show_header=False, title=f"{stage} of {trainer.ckpt_path or 'the weights'}")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("images", images)
    for name, value in sorted(trainer.callback_metrics.items()):
        table.add_row(name, four_digits(float(value)))
    return table


def _short(path: Path) -> str:
    """Relative to the current folder, if it is below it."""
    return _within(Path.cwd(), path)


def _within(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
