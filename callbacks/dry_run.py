"""Whether a trainer only tries the code, and nothing should be written."""

from lightning.pytorch import Trainer

__all__ = ["is_dry_run"]


def is_dry_run(trainer: Trainer) -> bool:
    """True with `fast_dev_run`."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
