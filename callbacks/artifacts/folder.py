"""The folder that holds checkpoints and artifacts: its names, its links, its removals."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mobileone.export.artifact import REJECTED, RejectedError
from mobileone.export.manifest import MANIFEST_NAME
from mobileone.io.atomic import atomic_write, discard, flush, point_link

__all__ = ["CheckpointFolder"]

_SUFFIX = ".ckpt"


class CheckpointFolder:
    """Checkpoints `<name>.ckpt`, artifacts `<name>/`, and links to the last and the best of each.

    A link to an artifact stays on the newest one that exists: after an export that failed, `last/`
    is older than `last.ckpt`, and whatever a link points to is kept. `best.ckpt` waits for the
    end of the export that moves `best/`, on the best one before it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @staticmethod
    def artifact_of(checkpoint: str | Path) -> Path:
        """The artifact that belongs to a checkpoint, there or not."""
        checkpoint = Path(checkpoint)
        return checkpoint.with_name(checkpoint.name.removesuffix(_SUFFIX))

    @classmethod
    def rejected_of(cls, checkpoint: str | Path) -> Path:
        """Where its artifact is if it failed its checks."""
        artifact = cls.artifact_of(checkpoint)
        return artifact.with_name(artifact.name + REJECTED)

    @classmethod
    def has_artifact(cls, checkpoint: str | Path) -> bool:
        """True if the checkpoint's artifact was published and not followed by a failed attempt."""
        published = (cls.artifact_of(checkpoint) / MANIFEST_NAME).is_file()
        return published and not cls._error_file(checkpoint).is_file()

    def linked_artifact(self, name: str) -> Path | None:
        """The artifact that the link `last` or `best` points to."""
        link = self.path / name
        return link.resolve() if link.is_symlink() and link.exists() else None

    def linked_checkpoints(self) -> set[str]:
        """The checkpoints that a link points to, by itself or through its artifact."""
        found = set()
        for name in ("last", "best"):
            link = self.path / f"{name}{_SUFFIX}"
            if link.is_symlink():
                found.add(str(link.parent / link.readlink()))
            if artifact := self.linked_artifact(name):
                found.add(str(self.path / f"{artifact.name}{_SUFFIX}"))
        return found

    def move_link(self, name: str, checkpoints: Iterable[str]) -> None:
        """Point `<name>.ckpt` to the first checkpoint, `<name>/` to the first artifact of them."""
        checkpoints = list(checkpoints)
        target = Path(checkpoints[0]) if checkpoints else None
        point_link(self.path / f"{name}{_SUFFIX}", target)
        artifacts = [self.artifact_of(c) for c in checkpoints if self.has_artifact(c)]
        link = self.path / name
        if artifacts or not link.exists():
            point_link(link, artifacts[0] if artifacts else None)

    def remove(self, checkpoint: str) -> None:
        """Remove a checkpoint with what belongs to it."""
        discard(self.artifact_of(checkpoint))
        discard(self.rejected_of(checkpoint))
        self._error_file(checkpoint).unlink(missing_ok=True)
        Path(checkpoint).unlink(missing_ok=True)

    def record_error(
        self, checkpoint: str | Path, status: str, error: str, metrics: Mapping[str, float]
    ) -> None:
        """Note next to the checkpoint why it has no artifact, and what a later attempt needs."""
        record = {"status": status, "error": error, "training": {"metrics": dict(metrics)}}
        with atomic_write(self._error_file(checkpoint)) as tmp_path:
            tmp_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            flush(tmp_path)

    def missed_metrics(self, checkpoint: str | Path) -> dict[str, float] | None:
        """The metrics of a checkpoint whose export failed; None if it did not."""
        record = self._error_record(checkpoint)
        return dict(record["training"]["metrics"]) if record else None

    def why_missing(self, checkpoint: str | Path) -> str:
        """Why a checkpoint has no artifact, in a line."""
        said = str(self._error_record(checkpoint).get("error", "it was not exported")).strip()
        # of a traceback the error itself
        return said.splitlines()[-1].rpartition(f"{RejectedError.__name__}: ")[2]

    def is_rejected(self, checkpoint: str | Path) -> bool:
        """Whether its last export failed the checks, as it would again."""
        record = self._error_record(checkpoint)
        # records of older versions have no status: their rejected folder shows it
        rejected = (self.rejected_of(checkpoint) / MANIFEST_NAME).is_file()
        default = "rejected" if rejected else "failed"
        return bool(record) and record.get("status", default) == "rejected"

    def _error_record(self, checkpoint: str | Path) -> dict[str, Any]:
        """Why a checkpoint has no artifact; empty if it has one."""
        file = self._error_file(checkpoint)
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def clear_error(self, checkpoint: str | Path) -> None:
        """Forget an error: the artifact exists."""
        self._error_file(checkpoint).unlink(missing_ok=True)

    @classmethod
    def _error_file(cls, checkpoint: str | Path) -> Path:
        artifact = cls.artifact_of(checkpoint)
        return artifact.with_name(f"{artifact.name}.export-error.json")
