"""Which run `--resume auto` continues, and from which checkpoint."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from callbacks.finite import not_finite_in
from lightning_modules.run_folder import RunFolder
from mobileone.export.checkpoint import read_checkpoint

__all__ = ["Continuation", "find_continuation", "newest_usable", "why_unusable"]

# what a run may change without becoming another: its length, how it is watched and saved
_FREE = re.compile(
    r"ckpt_path|weights_only|resume|config$|wandb\.|report\.|snapshots\.|data\.num_workers|"
    r"data\.persistent_workers|trainer\.(max_|enable_|log_every|logger|profiler|default_root)"
)
_SHOWN = 4


@dataclass(frozen=True)
class Continuation:
    """What to go on with.

    Attributes:
        run: the folder of the run, or None for a new one.
        checkpoint: the checkpoint to resume from, or None to begin.
        notes: what the user should know, a line each.
    """

    run: RunFolder | None
    checkpoint: Path | None
    notes: tuple[str, ...]


def find_continuation(parent: Path, config: Mapping[str, Any]) -> Continuation:
    """Look for the newest run with the same configuration that has something to go on with.

    Args:
        parent: folder of the runs of one name.
        config: the present configuration, as the run folder keeps it.

    Returns:
        That run with its newest usable checkpoint. If none of the same configuration has a
        checkpoint, the newest of them from its beginning; without such a run, a new one.
    """
    runs, notes = _readable(_newest_first(parent))
    differences = {run.path: _differences(_read_config(run), config) for run in runs}
    same = [run for run in runs if not differences[run.path]]
    for run in same:
        checkpoint, passed_over = newest_usable(run.path)
        notes += passed_over
        if checkpoint is not None:
            goes_on = f"resume: {run.path} goes on from {checkpoint}"
            return Continuation(run, checkpoint, (*notes, goes_on))
    if same:
        begins = f"resume: {same[0].path} begins again: there is no usable checkpoint"
        return Continuation(same[0], None, (*notes, begins))
    if not runs:
        nothing = f"resume: nothing in {parent} yet; a new run begins"
        return Continuation(None, None, (*notes, nothing))
    newest = runs[0].path
    found = differences[newest]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    note = f"resume: a new run begins, for {newest} has other options: {', '.join(found[:_SHOWN])}"
    return Continuation(None, None, (*notes, note + more))


def newest_usable(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint or snapshot of a run that can be read.

    Args:
        run: the run folder.

    Returns:
        The file, or None, and a line for each newer file that was passed over.
    """
    files = {path.resolve() for name in ("checkpoints", "snapshots") for path in _files(run / name)}
    notes: list[str] = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if (reason := why_unusable(path)) is None:
            return path, notes
        notes.append(f"resume: passed over {path}: {reason}")
    return None, notes


def why_unusable(checkpoint: Path) -> str | None:
    """Why training cannot go on from a file, or None; reads all of it to check its sums."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            if (broken := archive.testzip()) is not None:
                return f"it is damaged ({broken} is not as it was written)"
        contents = read_checkpoint(checkpoint)
    except ValueError as error:
        return str(error)
    except Exception as error:  # whatever flipped bits make of an archive
        return f"it is damaged or cut short ({error})"
    if "optimizer_states" not in contents:
        return "it holds weights only"
    wrong = not_finite_in(contents)
    return None if wrong is None else f"it holds values that are not finite ({wrong})"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.ckpt") if path.exists())


def _newest_first(parent: Path) -> list[Path]:
    found = [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if not path.is_symlink() and (path / "run.json").is_file()
    ]
    # of the same second the suffix counts: …-2, …-10
    return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)


def _readable(folders: list[Path]) -> tuple[list[RunFolder], list[str]]:
    """The runs whose record can be read, and a line for each other one."""
    runs: list[RunFolder] = []
    notes: list[str] = []
    for path in folders:
        try:
            runs.append(RunFolder.read(path))
        except ValueError as error:
            notes.append(f"resume: passed over {path}: {error}")
    return runs, notes


def _read_config(run: RunFolder) -> Mapping[str, Any]:
    if not run.config.is_file():
        return {"config.yaml": "missing"}
    try:
        read = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        read = None
    return read if isinstance(read, Mapping) else {"config.yaml": "unreadable"}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = dict(_flat(before)), dict(_flat(now))
    names = [name for name in sorted({*old, *new}) if not _FREE.match(name)]
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return [f"{name} {was!r} -> {is_!r}" for name, (was, is_) in pairs.items() if was != is_]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
