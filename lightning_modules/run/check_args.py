"""How long a training is, and where it writes: errors that can be found before it begins."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_modules.errors import UsageError
from lightning_modules.run.resume import epochs_done

__all__ = ["check_folders", "validate_duration"]

# at least; Lightning takes less without a word, or divides by it
_AT_LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "num_sanity_val_steps": -1}


def validate_duration(config: Namespace, checkpoint: Mapping[str, Any] | None) -> None:
    """Refuse a training without end, without a step, or without a validation, to save after.

    Args:
        config: The arguments of `fit`.
        checkpoint: The contents of the one that it resumes, if it does.

    Raises:
        UsageError: The length cannot be trained.
    """
    trainer = config.trainer
    epochs, steps, every = trainer.max_epochs, trainer.max_steps, trainer.check_val_every_n_epoch
    if trainer.fast_dev_run:
        return
    for name, least in _AT_LEAST.items():
        if trainer[name] is not None and trainer[name] < least:
            raise UsageError(f"--trainer.{name} {trainer[name]} must be at least {least}")
    if trainer.limit_train_batches == 0:
        raise UsageError(
            "--trainer.limit_train_batches 0 trains nothing: give at least 1, or leave it out"
        )
    if trainer.val_check_interval == 0:
        raise UsageError(
            "--trainer.val_check_interval 0 must be a number of batches from 1, or a share of the "
            "epoch above 0.0 and up to 1.0; null is once an epoch"
        )
    if 0 in (epochs, steps):
        name = "max_epochs" if epochs == 0 else "max_steps"
        raise UsageError(
            f"--trainer.{name} 0 trains nothing: give at least 1, or measure a checkpoint with "
            "`validate`"
        )
    if epochs == -1 and config.get("curriculum.phases"):
        raise UsageError(
            "a curriculum scales its phases to --trainer.max_epochs, which is -1 (no end): set it, "
            "or --curriculum.phases []"
        )
    if epochs == -1 and steps == -1:
        raise UsageError(
            "--trainer.max_epochs -1 and --trainer.max_steps -1 give no end, to which the "
            "schedules of learning rate and weight decay could come: set one of them"
        )
    if trainer.limit_val_batches == 0:
        raise UsageError(
            "--trainer.limit_val_batches 0 validates nothing, so that nothing would be saved: "
            "leave it out, or set it to a small number of batches"
        )
    if every is not None and every < 1:
        raise UsageError(
            f"--trainer.check_val_every_n_epoch {every} must be at least 1, or null with "
            "--trainer.val_check_interval in steps"
        )
    if epochs and every and 0 < epochs < every:
        raise UsageError(
            f"the training ends at --trainer.max_epochs {epochs}, before the first validation at "
            f"--trainer.check_val_every_n_epoch {every}: nothing would be saved; set the latter to "
            f"at most {epochs}"
        )
    done = 0 if checkpoint is None else epochs_done(checkpoint)
    if epochs and 0 < epochs < done:
        raise UsageError(
            f"{config.ckpt_path} was written after {done} epochs, more than --trainer.max_epochs "
            f"{epochs}: there is nothing to resume; give at least {done}, or begin a new run "
            "with another --run.name, from its weights with --model.weights"
        )


def check_folders(config: Namespace) -> None:
    """Refuse places for checkpoints that cannot be folders.

    Args:
        config: The arguments of `fit`.

    Raises:
        UsageError: A file is there, or the folder cannot be written to.
    """
    for option in ("checkpoint.dirpath", "snapshots.dirpath"):
        if (given := config.get(option)) is None:
            continue
        path = Path(given).expanduser().absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not there.is_dir():
            raise UsageError(
                f"--{option} {given}: {there} is a file; name a folder, or leave it out"
            )
        if not os.access(there, os.W_OK):
            raise UsageError(
                f"--{option} {given}: {there} cannot be written to; name another folder"
            )
