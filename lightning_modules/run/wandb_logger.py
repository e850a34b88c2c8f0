"""A wandb logger whose failures do not end a training of days."""

import netrc
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_modules.run.folder import RunFolder

__all__ = [
    "FaultTolerantWandbLogger",
    "WandbOptions",
    "check_tracking",
    "csv_logger",
    "end_offline_runs",
    "finish_timeout",
    "finish_tracking",
    "how_to_send",
    "make_loggers",
]

_FINISH_SECONDS = 120.0


class FaultTolerantWandbLogger(WandbLogger):
    """Continues without wandb when wandb fails, and reports how to send the log later.

    A connection that is lost during the run costs nothing: wandb writes the log to the
    run folder first, and sends what it can. But its calls raise when its own process has died, and
    at the end it would wait for the server without limit. Here a failing call is reported once, and
    the end waits as long as `finish_timeout` allows.

    Args:
        options: of `WandbLogger`.

    Attributes:
        last_error: what went wrong last, or None.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # wandb warns of this key even where it is None
        self.last_error: str | None = None

    @property
    def online(self) -> bool:
        """Whether the run is sent while it continues."""
        return not self._offline

    @property
    def folder(self) -> str:
        """Where wandb keeps the log."""
        return str(self._experiment.settings.sync_dir) if self._experiment else str(self.save_dir)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As the base class, but errors do not raise."""
        self._attempt(lambda: super(FaultTolerantWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        """As the base class, but errors do not raise."""
        self._attempt(lambda: super(FaultTolerantWandbLogger, self).log_hyperparams(params))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **more: Any) -> None:
        """As the base class, but errors do not raise."""
        self._attempt(
            lambda: super(FaultTolerantWandbLogger, self).log_image(key, images, step, **more)
        )

    @rank_zero_only
    def connect(self) -> None:
        """Start the run now, not at the first metric.

        Raises:
            wandb.errors.CommError: the server does not reply in time.
        """
        _ = self.experiment

    @rank_zero_only
    def finish(self) -> str | None:
        """End the run, and wait until it is sent.

        Returns:
            What is to be done if wandb has not received all of it.
        """
        try:
            self.experiment.finish()
        except Exception as error:
            self.last_error = self.last_error or _line(error)
        if self.last_error is None:
            return None
        return (
            f"wandb has not received the complete log ({self.last_error}). "
            f"{how_to_send(self.folder)}"
        )

    @rank_zero_only
    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if self.last_error is None:
                rank_zero_warn(
                    f"wandb does not take everything ({_line(error)}): training continues, and the "
                    "metrics are in metrics/version_*/metrics.csv too"
                )
            self.last_error = _line(error)


def how_to_send(folder: str) -> str:
    """Where a log is kept, and how to send it."""
    return f"It is kept in {folder}; to send it: wandb sync {folder}"


def finish_timeout() -> Any:
    """wandb's settings that bound the wait at a run's end; the environment goes before them."""
    import wandb

    settings = wandb.Settings(finish_timeout_raises=True)
    if not os.environ.get("WANDB_FINISH_TIMEOUT"):
        settings.finish_timeout = _FINISH_SECONDS
    return settings


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# a refusal by the server, except those which report that it is busy
_REFUSED = re.compile(r"returned error 4(?!08|29)\d\d")


@dataclass
class WandbOptions:
    """How the run is tracked in wandb.

    Args:
        mode: offline writes `<run>/wandb` and needs neither network nor key (send it later with
            `wandb sync`); online streams, and continues offline where wandb cannot be reached;
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


def csv_logger(run: RunFolder) -> CSVLogger:
    """The run folder's own curves: `metrics/version_*/metrics.csv`, a new version a resume."""
    return CSVLogger(run.path, name="metrics")


def make_loggers(run: RunFolder, options: WandbOptions) -> list[Logger]:
    """Make the run's loggers.

    Without a connection an online run becomes an offline one, with a warning: no training, and no
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
    loggers: list[Logger] = [csv_logger(run)]
    if options.mode == "disabled":
        return loggers
    if options.mode == "online":
        return [*loggers, _connected(run, options)]
    return [*loggers, _wandb_logger(run, options, "offline")]


def finish_tracking(loggers: list[Logger]) -> list[str]:
    """End the runs that wandb should have got by now; a line for each of which it has not all."""
    of_wandb = [logger for logger in loggers if isinstance(logger, FaultTolerantWandbLogger)]
    due = [logger for logger in of_wandb if logger.online or logger.last_error is not None]
    return [line for logger in due if (line := logger.finish()) is not None]


def end_offline_runs(loggers: list[Logger]) -> bool:
    """End wandb's runs so that their folder can go; False, and nothing, if a server has one."""
    of_wandb = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    for logger in of_wandb:
        if not isinstance(logger, FaultTolerantWandbLogger) or logger.online:
            return False
        logger.finish()
    return True


def _wandb_logger(
    run: RunFolder, options: WandbOptions, mode: Literal["offline", "online"], **more: Any
) -> FaultTolerantWandbLogger:
    return FaultTolerantWandbLogger(
        mode=mode,
        offline=mode == "offline",
        save_dir=run.path,
        id=run.wandb_id,
        name=run.wandb_id,
        resume="allow" if mode == "online" else None,
        project=options.project,
        entity=options.entity,
        group=options.group,
        tags=options.tags,
        **more,
    )


def _connected(run: RunFolder, options: WandbOptions) -> FaultTolerantWandbLogger:
    import wandb
    from wandb.errors import CommError

    logger = _wandb_logger(run, options, "online", settings=finish_timeout())
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
    offline.last_error = f"it could not be reached: {reason}"
    rank_zero_warn(
        f"wandb: {offline.last_error}. This run is logged offline. {how_to_send(offline.folder)}"
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
