"""Loggers of a run: wandb, offline unless asked otherwise, and a CSV file beside it."""

import netrc
import os
import re
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.run.folder import RunFolder
from lightning_modules.run.wandb_logger import SteadyWandbLogger, how_to_send, patience

__all__ = ["WandbOptions", "check_tracking", "finish_tracking", "make_loggers"]

# an answer of the server's, but for those which say that it is busy
_REFUSED = re.compile(r"returned error 4(?!08|29)\d\d")


@dataclass
class WandbOptions:
    """How the run is tracked in wandb.

    Args:
        mode: offline writes `<run>/wandb` and needs neither network nor key (send it later with
            `wandb sync`); online streams, and goes on offline where wandb cannot be reached;
            disabled tracks nothing.
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

    Without a connection an online run becomes an offline one, and says so: no training, and no
    restart of one, waits for a network.

    Args:
        run: Where they write; its id continues a resumed run.
        options: The wandb options.

    Returns:
        A CSV logger (`<run>/metrics/version_*/metrics.csv`, a new version a resume) and, unless
        disabled, a wandb logger.

    Raises:
        ValueError: wandb should be online, and the server refuses the key, team or project.
    """
    loggers: list[Logger] = [CSVLogger(run.path, name="metrics")]
    if options.mode == "disabled":
        return loggers
    if options.mode == "online":
        return [*loggers, _connected(run, options)]
    return [*loggers, _wandb_logger(run, options, "offline")]


def finish_tracking(loggers: list[Logger]) -> list[str]:
    """End the runs that wandb should have got by now; a line for each of which it has not all."""
    of_wandb = [logger for logger in loggers if isinstance(logger, SteadyWandbLogger)]
    due = [logger for logger in of_wandb if logger.online or logger.trouble is not None]
    return [line for logger in due if (line := logger.finish()) is not None]


def _wandb_logger(
    run: RunFolder, options: WandbOptions, mode: Literal["offline", "online"], **more: Any
) -> SteadyWandbLogger:
    return SteadyWandbLogger(
        mode=mode,
        offline=mode == "offline",
        save_dir=run.path,
        id=run.wandb_id,
        name=run.wandb_id,
        resume="allow",
        project=options.project,
        entity=options.entity,
        group=options.group,
        tags=options.tags,
        **more,
    )


def _connected(run: RunFolder, options: WandbOptions) -> SteadyWandbLogger:
    import wandb
    from wandb.errors import CommError

    logger = _wandb_logger(run, options, "online", settings=patience())
    try:
        logger.connect()  # wandb retries for a while
        return logger
    except CommError as error:
        reason = str(error).splitlines()[0]
        if _REFUSED.search(reason):
            raise ValueError(
                f"wandb refuses the run ({reason}): run `wandb login` again and look at "
                "--wandb.entity and --wandb.project, or leave wandb.mode at offline and send the "
                "run later with `wandb sync`"
            ) from error
    # or wandb's process would keep the id; our parent's we cannot end, so we start one of our own
    os.environ.pop("WANDB_SERVICE", None)
    wandb.teardown()
    offline = _wandb_logger(run, options, "offline")
    offline.connect()
    offline.trouble = f"it could not be reached: {reason}"
    rank_zero_warn(
        f"wandb: {offline.trouble}. This run is logged offline. {how_to_send(offline.folder)}"
    )
    return offline


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
