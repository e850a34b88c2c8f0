"""The folder of a run: a new one each time, or that of the checkpoint which is continued."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["RunFolder"]

_RECORD = "run.json"
# set for the processes that a distributed strategy starts by running the same command again
_INHERITED = "MOBILEONE_RUN_FOLDER"


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the id under which wandb knows it.

    Attributes:
        path: `<root>/<name>/<time>`; `<root>/<name>/latest` links to the newest.
        wandb_id: Kept over resumes, so that the curves go on.
    """

    path: Path
    wandb_id: str

    @classmethod
    def create(cls, root: str, name: str) -> "RunFolder":
        """Make the folder of a new run.

        Args:
            root: Folder of all runs.
            name: Name of the experiment.

        Returns:
            The folder; in the other processes of the same distributed run, the same one.
        """
        if inherited := os.environ.get(_INHERITED):
            return cls.read(Path(inherited))
        stamp = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
        parent = Path(root).expanduser() / name
        if stamp is None:  # one process starts all others, or there is only this one
            run = cls._claim(parent)
            os.environ[_INHERITED] = str(run.path)
        else:  # the launcher starts all processes at once: they agree through its id
            run = cls(parent / stamp, stamp)
            run.path.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            run._record()
        return run

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> "RunFolder | None":
        """The run that wrote `<run>/checkpoints/<name>.ckpt`, or None if it was none of ours."""
        folder = Path(checkpoint).absolute().parent.parent
        return cls.read(folder) if (folder / _RECORD).is_file() else None

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read a run's record.

        Raises:
            ValueError: The record is not readable.
        """
        try:
            return cls(path, json.loads((path / _RECORD).read_text(encoding="utf-8"))["wandb_id"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path / _RECORD} is damaged ({error}): put a JSON object with the key "
                '"wandb_id" there, or move the checkpoint out of the run folder'
            ) from error

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints and artifacts go."""
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        """The run's whole configuration."""
        return self.path / "config.yaml"

    @classmethod
    def _claim(cls, parent: Path) -> "RunFolder":
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            path = parent / f"{stamp}{suffix}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(path, f"{parent.name}-{path.name}")
        raise FileExistsError(f"{parent} has a thousand runs of this second")

    def _record(self) -> None:
        record = {k: v for k, v in asdict(self).items() if k != "path"}
        (self.path / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        link = self.path.parent / f".latest-{os.getpid()}"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(self.path.name, target_is_directory=True)
            link.replace(self.path.parent / "latest")
        except OSError:  # no links on this file system, or a real folder of that name
            link.unlink(missing_ok=True)
