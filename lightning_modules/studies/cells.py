"""A study's trainings: each a `mobileone fit`, its result a file, so that a study can go on."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_modules.run.fit import TrainingCLI, run
from mobileone.io.atomic import replace_text

__all__ = ["Cells", "build", "identity", "parse", "train"]


class _Parsed(TrainingCLI):
    """Reads and checks a configuration, and stops there."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """The configuration that options of `mobileone fit` give.

    Raises:
        SystemExit: They cannot be used; the message has been printed.
    """
    config: dict[str, Any] = run("fit", list(argv), _Parsed).config["fit"].as_dict()
    return config


class _Built(TrainingCLI):
    """Makes the classes of a configuration, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def build(argv: Sequence[str]) -> TrainingCLI:
    """Module and data that options of `mobileone fit` give, without a run folder.

    Raises:
        SystemExit: The options cannot be used; the message has been printed.
    """
    return run("fit", [*argv, "--trainer.fast_dev_run", "1"], _Built)


def identity(parsed: Mapping[str, Any]) -> str:
    """What must not change between the cells of a study, as text; not where it is written."""
    left_out = ("config", "run", "wandb", "seed_everything")
    kept = {key: value for key, value in parsed.items() if key not in left_out}
    return json.dumps(kept, sort_keys=True, default=str)


@dataclass(frozen=True)
class Cells:
    """The files of what is finished: one for each setting and seed.

    Attributes:
        folder: Where they are.
        identity: What all have in common.
    """

    folder: Path
    identity: str

    def path(self, key: str, seed: int) -> Path:
        """Where a result is. Settings of the same key share it."""
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.folder / f"{digest}-seed{seed}.json"

    def read(self, key: str, seed: int) -> dict[str, Any] | None:
        """The result, or None if it has not been finished.

        Raises:
            ValueError: It is of a study with another configuration.
        """
        path = self.path(key, seed)
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds trainings with another configuration: give each study a "
                "folder of its own, or remove that one"
            )
        return content

    def write(self, key: str, seed: int, values: Mapping[str, Any]) -> None:
        """Write the result."""
        content: dict[str, Any] = {"setting": key, "seed": seed, "identity": self.identity}
        replace_text(self.path(key, seed), json.dumps(content | dict(values), indent=2) + "\n")


def train(argv: Sequence[str], root: Path, name: str) -> Trainer:
    """Run `mobileone fit` to its end, in a run folder that nobody has begun to fill.

    Args:
        argv: Its options.
        root: Folder of the runs.
        name: Of this run; what is there is removed.

    Raises:
        RuntimeError: It was ended early.
    """
    shutil.rmtree(root / name, ignore_errors=True)
    try:
        trainer = run("fit", [*argv, "--run.root", str(root), "--run.name", name]).trainer
    finally:
        _finish_wandb()
    if not trainer.state.finished or trainer.current_epoch != trainer.max_epochs:
        raise RuntimeError(
            f"the training {name} was ended early: start the study again to continue"
        )
    return trainer


def _finish_wandb() -> None:
    """End the run, or the next training would continue in it."""
    import wandb

    if wandb.run is not None:
        wandb.finish()
