"""What a checkpoint alone tells of the moment at which it was written."""

from pathlib import Path

from torch import Tensor

from mobileone.export import TrainingState
from mobileone.export.checkpoint import read_checkpoint

__all__ = ["training_state"]


def training_state(checkpoint: str, monitor: str, score: Tensor | None) -> TrainingState:
    """Describe a checkpoint whose run was killed before its artifact was made.

    Args:
        checkpoint: the file.
        monitor: the metric that ranks checkpoints.
        score: its value, if the checkpoint is ranked.

    Returns:
        Epoch, step and that one metric: the others were not kept.

    Raises:
        ValueError: the file is damaged.
    """
    contents = read_checkpoint(Path(checkpoint))
    metrics = {} if score is None else {monitor: float(score)}
    return TrainingState(
        epoch=contents.get("epoch"),
        step=contents.get("global_step"),
        metrics=metrics,
        checkpoint=Path(checkpoint).name,
    )
