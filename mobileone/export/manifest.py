"""The description of an artifact: what is inside, where it comes from, and the hashes to check."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Parity
from mobileone.io.checksum import file_sha256
from mobileone.io.versions import installed_versions

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "TrainingState",
    "describe_files",
    "describe_format",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TrainingState:
    """At which point of its training the model was; None where it is not known.

    Attributes:
        epoch: epochs completed before this one, from 0.
        step: optimizer steps taken.
        metrics: the last logged value of each metric.
        checkpoint: file name of the checkpoint that holds the weights.
    """

    epoch: int | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about an artifact.

    Attributes:
        spec: model, classes, input size, normalization, resize and crop.
        training: epoch, step, metrics, checkpoint.
        metadata: author, license, description, version.
        parameters: number of parameters of the fused model.
        channel_order: `RGB`, `L` (gray) or `unspecified`.
        formats: by format name: `path`, `input`, `output`, `bytes`, `files` (by path: `bytes`,
            `sha256`), `operations` (how often each occurs in it), `parity`.
        images: what the files were compared on: `given` (the first validation images, after a
            validation) or `synthetic`.
        condition: largest change of an output of a layer by one step of one of its inputs, in a
            network of integers; None in one of floats.
        rejected: why formats that were asked for are not among the files, by name.
        problems: why the files of a folder `<name>.rejected` were not published.
        versions: of Python and the packages that wrote the files.
        created: time of writing, UTC, ISO 8601.
        schema_version: version of this layout.
    """

    spec: ExportSpec
    training: TrainingState
    metadata: Metadata
    parameters: int
    channel_order: str
    formats: dict[str, dict[str, Any]]
    images: str = "synthetic"
    condition: float | None = None
    rejected: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=installed_versions)
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    schema_version: int = SCHEMA_VERSION

    def save(self, directory: Path) -> None:
        """Write `manifest.json` into the folder."""
        said = json.dumps({**asdict(self), "spec": self.spec.to_dict()})
        # JSON has no NaN and no infinity: they become null
        values = json.loads(said, parse_constant=lambda name: None)
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read the manifest of an artifact folder, or a `manifest.json` itself.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not a manifest that this version understands.
        """
        path = Path(path)
        file = path / MANIFEST_NAME if path.is_dir() else path
        if not file.is_file():
            best = path / "checkpoints/best"  # of a run folder
            hint = f"did you mean {best}?" if best.is_dir() else "is it an artifact folder?"
            raise FileNotFoundError(f"no {MANIFEST_NAME} in {path}: {hint}")
        if file.suffix == ".ckpt":
            raise ValueError(
                f"{file} is a training checkpoint; its artifact, if one was exported, is the "
                f"folder {file.with_suffix('')}"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"schema version {values['schema_version']}, this version reads "
                    f"{SCHEMA_VERSION}"
                )
            known = {f.name for f in fields(cls)}
            nested = {
                "spec": ExportSpec.from_dict(values["spec"]),
                "training": TrainingState(**values["training"]),
                "metadata": Metadata(**values["metadata"]),
                "problems": tuple(values.get("problems", ())),
            }
            loaded = cls(**{**{k: v for k, v in values.items() if k in known}, **nested})
            for entry in loaded.formats.values():
                _check_inside(entry["path"], entry["files"])
            loaded._check_types()
            return loaded
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is not a readable manifest: {error}") from error

    def _check_types(self) -> None:
        """What others read as numbers and tables is that.

        Raises:
            TypeError: it is not.
        """
        for name in ("versions", "rejected"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"`{name}` is no table")
        numbers = {"parameters": self.parameters, "condition": self.condition}
        for name, value in {**numbers, **self.training.metrics}.items():
            if not isinstance(value, int | float | None):
                raise TypeError(f"`{name}` (={value!r}) is no number")

    def measurements(self) -> dict[str, float]:
        """What was measured of each file, under the names that loggers get."""
        return {
            f"export/{name}/{key}": float(value)
            for name, entry in self.formats.items()
            for key, value in {"bytes": entry["bytes"], **entry["parity"]}.items()
            if key in ("bytes", "max_relative_error", "top1_agreement") and value is not None
        }

    def described(self) -> dict[str, str]:
        """Each format in words: file, size and faithfulness, or why it was left out."""
        written = {
            name: f"{entry['path']}, {_size(entry['bytes'])}, {_in_words(entry['parity'])}"
            for name, entry in self.formats.items()
        }
        return written | {name: f"left out: {reason}" for name, reason in self.rejected.items()}

    def name_of(self, file: Path) -> str | None:
        """The format that a file of the artifact has, by its name; None if it is not of it."""
        return next((n for n, entry in self.formats.items() if entry["path"] == file.name), None)

    def verify(self, directory: str | Path, names: Iterable[str] | None = None) -> None:
        """Compare every file of the artifact in `directory` with its recorded size and hash.

        Args:
            directory: the artifact folder.
            names: of the formats to look at; None for all.

        Raises:
            ValueError: files are missing, changed, or not in the manifest.
        """
        directory = Path(directory)
        problems = [] if self.formats else ["it lists no file"]
        for name in self.formats if names is None else names:
            entry = self.formats[name]
            found = describe_files(directory / entry["path"])
            expected = entry["files"]
            problems += [f"{name}: {p} is missing" for p in sorted(set(expected) - set(found))]
            problems += [f"{name}: {p} is unknown" for p in sorted(set(found) - set(expected))]
            problems += [
                f"{name}: {p} has changed"
                for p in sorted(set(found) & set(expected))
                if found[p] != expected[p]
            ]
        if problems:
            raise ValueError(f"{directory} does not match its manifest: {'; '.join(problems)}")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def _in_words(parity: Mapping[str, Any]) -> str:
    """A comparison in words; of integers, whose errors are steps, the classes alone."""
    if (error := parity.get("max_relative_error")) is None:
        return f"parity {parity['status']}: {parity.get('reason', 'no reason given')}"
    said = [] if "min_agreement" in parity else [f"parity error {error:.1e}"]
    if (agreement := parity.get("top1_agreement")) is not None:
        images = parity["images"]
        said.append(f"same class {round(agreement * images)}/{images}")
    return ", ".join(said)


def _check_inside(path: str, files: Iterable[str]) -> None:
    """Refuse names that lead out of the artifact's folder, which only a forged manifest has.

    Raises:
        ValueError: one does.
    """
    for name in (path, *files):
        parts = re.split(r"[/\\:]", name)
        if parts[0] != path or {"", ".", ".."} & set(parts):
            raise ValueError(f"{name!r} leads out of the artifact's folder")


def describe_files(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of a file, or of each file in a folder, by path from `path.parent`."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else [path]
    return {
        file.relative_to(path.parent).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in sorted(files)
        if file.is_file()
    }


def describe_format(
    path: Path, interface: Mapping[str, Any], operations: Counter[str], checks: Mapping[str, Parity]
) -> dict[str, Any]:
    """What the manifest reports about a format.

    Args:
        path: its file or folder.
        interface: what it takes and returns.
        operations: how often it has each operation.
        checks: how it was compared, by the comparison's name.
    """
    files = describe_files(path)
    return {
        "path": path.name,
        **interface,
        "bytes": sum(file["bytes"] for file in files.values()),
        "files": files,
        "operations": dict(operations.most_common()),
        **{name: parity.to_dict() for name, parity in checks.items()},
    }
