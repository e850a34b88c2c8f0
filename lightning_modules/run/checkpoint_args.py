"""The checkpoint that a user names by `--ckpt_path`, and what follows from it."""

from pathlib import Path
from typing import Any

from lightning_modules.errors import UsageError
from lightning_modules.run.config_files import option_value
from lightning_modules.run.folder import RunFolder
from lightning_modules.run.resume import newest_usable
from lightning_modules.run_config import check_run_config
from mobileone.export.checkpoint import read_checkpoint

__all__ = ["hyper_parameters", "read_given", "with_config_of_the_run"]

_WHOLE = (
    "--trainer.limit_val_batches=1.0",
    "--trainer.limit_test_batches=1.0",
    "--trainer.overfit_batches=0",
)

# what the data decide, what is done once, and what Lightning adds
_OF_THE_DATA = ("num_classes", "in_chans", "pretrained", "weights", "_instantiator")


def with_config_of_the_run(argv: list[str], whole: bool) -> list[str]:
    """Put the configuration of `--ckpt_path`'s run before arguments that give none.

    Args:
        argv: Of the subcommand.
        whole: Whether all data are wanted, whatever limits the run had.

    Raises:
        UsageError: It may not be read, see `check_run_config`.
    """
    checkpoint = option_value(argv, "--ckpt_path")
    if checkpoint is None or option_value(argv, "--config", "-c") is not None:
        return argv
    found = RunFolder.of_checkpoint(checkpoint)
    if found is None or not found.config.is_file():
        return argv
    check_run_config(found.config)
    return ["--config", str(found.config), *(_WHOLE if whole else ()), *argv]


def hyper_parameters(checkpoint: str) -> dict[str, Any]:
    """Arguments of the model that a checkpoint was trained with, less those of the data.

    Raises:
        UsageError: The checkpoint cannot be read.
    """
    known = read_given(checkpoint).get("hyper_parameters", {})
    return {k: v for k, v in known.items() if k not in _OF_THE_DATA}


def read_given(checkpoint: str) -> dict[str, Any]:
    """The contents of the checkpoint that the user names.

    Raises:
        UsageError: It cannot be read; the message names the run's newest one that can.
    """
    try:
        return read_checkpoint(Path(checkpoint))
    except ValueError as error:
        raise UsageError(_with_another(error, checkpoint)) from error


def _with_another(error: ValueError, checkpoint: str) -> str:
    """The error, with an older checkpoint of the run if one can be read."""
    run = RunFolder.of_checkpoint(checkpoint)
    other = None if run is None else newest_usable(run.path)[0]
    if other is None:
        return str(error)
    return f"{error}\nthe newest checkpoint of this run that can be read is {other}"
