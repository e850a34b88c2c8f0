"""A wandb logger whose troubles do not end a training of days."""

import os
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

__all__ = ["SteadyWandbLogger", "how_to_send", "patience"]

_FINISH_SECONDS = 120.0


class SteadyWandbLogger(WandbLogger):
    """Goes on without wandb when wandb fails, and tells how to send the log later.

    A connection that is lost while the run is under way costs nothing: wandb writes the log to the
    run folder first, and sends what it can. But its calls raise when its own process has died, and
    at the end it would wait for the server without limit. Here a failing call is said once, and the
    end waits as long as `patience` says.

    Args:
        options: of `WandbLogger`.

    Attributes:
        trouble: what went wrong last, or None.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # wandb warns of this key even where it is None
        self.trouble: str | None = None

    @property
    def online(self) -> bool:
        """Whether the run is sent while it goes on."""
        return not self._offline

    @property
    def folder(self) -> str:
        """Where wandb keeps the log."""
        return str(self._experiment.settings.sync_dir) if self._experiment else str(self.save_dir)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As the base class, but for errors."""
        self._attempt(lambda: super(SteadyWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        """As the base class, but for errors."""
        self._attempt(lambda: super(SteadyWandbLogger, self).log_hyperparams(params))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **more: Any) -> None:
        """As the base class, but for errors."""
        self._attempt(lambda: super(SteadyWandbLogger, self).log_image(key, images, step, **more))

    @rank_zero_only
    def connect(self) -> None:
        """Start the run now, not at the first metric.

        Raises:
            wandb.errors.CommError: the server does not answer in time.
        """
        _ = self.experiment

    @rank_zero_only
    def finish(self) -> str | None:
        """End the run, and wait until it is sent.

        Returns:
            What is to be done if wandb has not got all of it.
        """
        try:
            self.experiment.finish()
        except Exception as error:
            self.trouble = self.trouble or _line(error)
        if self.trouble is None:
            return None
        return f"wandb has not got the whole log ({self.trouble}). {how_to_send(self.folder)}"

    @rank_zero_only
    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if self.trouble is None:
                rank_zero_warn(
                    f"wandb does not take everything ({_line(error)}): training goes on, and the "
                    "metrics are in metrics/version_*/metrics.csv too"
                )
            self.trouble = _line(error)


def how_to_send(folder: str) -> str:
    """Where a log is kept, and how to send it."""
    return f"It is kept in {folder}; to send it: wandb sync {folder}"


def patience() -> Any:
    """wandb's settings that bound the wait at a run's end; the environment goes before them."""
    import wandb

    settings = wandb.Settings(finish_timeout_raises=True)
    if not os.environ.get("WANDB_FINISH_TIMEOUT"):
        settings.finish_timeout = _FINISH_SECONDS
    return settings


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
