"""Loggers of a run: wandb, offline unless asked otherwise, and a CSV file beside it."""

import netrc
import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_modules.run_folder import RunFolder

__all__ = ["WandbOptions", "check_tracking", "make_loggers"]


@dataclass
class WandbOptions:
    """How the run is tracked in wandb.

    Args:
        mode: offline writes `<run>/wandb` and needs neither network nor key (send it later with
            `wandb sync`); online streams; disabled tracks nothing.
        project: wandb project.
        entity: wandb user or team; None for your default.
        group: groups runs, for example the seeds of one experiment.
        tags: labels of the run.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "mobileone"
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None


def make_loggers(run: RunFolder, options: WandbOptions) -> list[Logger]:
    """Make the run's loggers.

    Args:
        run: Where they write; its id continues a resumed run.
        options: The wandb options.

    Returns:
        A CSV logger (`<run>/metrics/version_*/metrics.csv`, a new version a resume) and, unless
        disabled, a wandb logger.

    Raises:
        ValueError: wandb should be online and cannot be reached.
    """
    loggers: list[Logger] = [CSVLogger(run.path, name="metrics")]
    if options.mode == "disabled":
        return loggers
    logger = WandbLogger(
        save_dir=run.path,
        id=run.wandb_id,
        name=run.wandb_id,
        resume="allow",
        offline=options.mode == "offline",
        project=options.project,
        entity=options.entity,
        group=options.group,
        tags=options.tags,
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of this key even where it is None
    if options.mode == "online":
        _connect(logger)
    return [*loggers, logger]


def _connect(logger: WandbLogger) -> None:
    from wandb.errors import CommError

    try:
        _ = logger.experiment  # wandb retries for a while; of later losses it takes care itself
    except CommError as error:
        raise ValueError(
            f"wandb cannot be reached ({error}): try again, or leave wandb.mode at offline and "
            "send the run later with `wandb sync`"
        ) from error


def check_tracking(options: WandbOptions) -> None:
    """Refuse online tracking that cannot work, before anything is written.

    Raises:
        ValueError: There is no API key.
    """
    if options.mode != "online" or os.environ.get("WANDB_API_KEY"):
        return
    import wandb

    host = urlsplit(wandb.Settings().base_url).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise ValueError(
            "wandb.mode=online needs an API key: run `wandb login` or set WANDB_API_KEY, or leave "
            "the mode at offline and send the run later with `wandb sync`"
        )
