"""The folder of a run: a new one each time, or that of the checkpoint which is continued."""

import json
import logging
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mobileone.collapsed import keep_choices
from mobileone.io.atomic import point_link, replace_text

__all__ = ["RunFolder", "SaveRunConfig"]

_RECORD = "run.json"


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the id under which wandb knows it.

    Attributes:
        path: `<root>/<name>/<time>`; `<root>/<name>/latest` links to the newest with a result.
        wandb_id: Kept over resumes, so that the curves continue.
        finished: Whether its training came to its end; None if its record does not have it.
        made: How many of the folders above it were made for it.
    """

    path: Path
    wandb_id: str
    finished: bool | None = None
    made: int = 0

    @staticmethod
    def parent(root: str, name: str) -> Path:
        """Where all runs of a name are.

        Raises:
            ValueError: The name leads out of the root.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"--run.name {name!r} leads out of --run.root {root!r}: give a name such as "
                "`mine` or `pets/s1`, and another root if the runs belong elsewhere"
            )
        return (Path(root).expanduser() / name).absolute()

    @classmethod
    def create(cls, root: str, name: str) -> "RunFolder":
        """Make the folder of a new run.

        Of several processes only the one of rank 0 makes a folder. The others write nothing, and
        take the checkpoints' folder from it when they are connected.

        Args:
            root: Folder of all runs.
            name: Name of the experiment.

        Returns:
            The folder.
        """
        parent = cls.parent(root, name)
        rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
        if rank:
            return cls(parent / f"rank-{rank}", "")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            path = parent / f"{stamp}{suffix}"
            made = sum(not folder.exists() for folder in path.parents)
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            wandb_id = f"{name.replace('/', '-')}-{path.name}-{secrets.token_hex(2)}"
            run = cls(path, wandb_id, made=made)
            run.set_finished(finished=False)
            return run
        raise FileExistsError(f"{parent} has a thousand runs of this second")

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> "RunFolder | None":
        """The run that wrote `<run>/checkpoints/<name>.ckpt`, or None if it was not ours."""
        # links are followed once: `latest` may point elsewhere before this run ends
        folder = Path(checkpoint).absolute().parent.resolve().parent
        return cls.read(folder) if (folder / _RECORD).is_file() else None

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read a run's record.

        Raises:
            ValueError: The record is not readable.
        """
        try:
            record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
            return cls(path, record["wandb_id"], record.get("finished"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / _RECORD} is damaged ({error}): put a JSON object with the key "
                '"wandb_id" there, or move the checkpoint out of the run folder'
            ) from error

    def discard(self) -> None:
        """Remove a folder that nothing was trained in; one with checkpoints stays."""
        if any(self.path.rglob("*.ckpt")):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # it holds other runs
            for folder in self.path.parents[: max(1, self.made)]:
                folder.rmdir()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints and artifacts go."""
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        """The run's complete configuration."""
        return self.path / "config.yaml"

    def write_config(self, text: str) -> None:
        """Keep the configuration, in place of an older one."""
        replace_text(self.config, text)

    def set_finished(self, finished: bool) -> None:
        """Write the record, with whether the training came to its end."""
        record = {"wandb_id": self.wandb_id, "finished": finished}
        replace_text(self.path / _RECORD, json.dumps(record))

    def make_latest(self) -> None:
        """Let `latest` next to the folder link to it; not every file system has links."""
        with suppress(OSError):
            point_link(self.path.parent / "latest", self.path)


class SaveRunConfig(SaveConfigCallback):
    """Keep a fit's configuration, once nothing can go wrong with it, and point `latest` to it.

    Attributes:
        began: Whether training has begun, after all that can be refused.
    """

    began: bool = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: the checkpoint to resume may not fit, and the run's file is good."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all ranks resume from one file; the trainer knows it only now.

        From here on forms of blocks that are measured are the run's: see `keep_choices`.

        Raises:
            RuntimeError: They do not.
        """
        mine = str(trainer.ckpt_path)
        if (first := trainer.strategy.broadcast(mine)) != mine:
            raise RuntimeError(
                f"rank {trainer.global_rank} would resume from {mine}, rank 0 from {first}: put "
                "--run.root on a file system that all nodes see"
            )
        keep_choices(Path(trainer.default_root_dir) / "forms", trainer.global_rank)
        if trainer.is_global_zero:
            _say_what_was_measured()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration to `<run>/config.yaml` and the loggers; log in every epoch."""
        self.began = True
        _log_in_every_epoch(trainer)
        if not trainer.is_global_zero:
            return
        run = RunFolder.read(Path(trainer.default_root_dir))
        run.write_config(self.parser.dump(self.config, skip_none=False))
        run.set_finished(finished=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that nothing is left to do: a run of this name with other options may begin."""
        if trainer.is_global_zero:
            RunFolder.read(Path(trainer.default_root_dir)).set_finished(finished=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let what this process trains next be no part of the run."""
        keep_choices(None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now there is a result: let `latest` link to this run."""
        if trainer.is_global_zero:
            RunFolder.read(Path(trainer.default_root_dir)).make_latest()


def _say_what_was_measured() -> None:
    logger = logging.getLogger("mobileone.collapsed.trial")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def _log_in_every_epoch(trainer: Trainer) -> None:
    """An epoch shorter than the interval would leave no learning rate in the logs."""
    interval = cast(Any, trainer)
    batches = int(min(trainer.num_training_batches, interval.log_every_n_steps))
    interval.log_every_n_steps = max(1, batches)
