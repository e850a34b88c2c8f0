"""Which run `--resume auto` continues, and from which checkpoint."""

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from callbacks.checkpointing import find_nonfinite, step_in_name
from lightning_modules.errors import UsageError
from lightning_modules.run.folder import RunFolder
from mobileone.export.checkpoint import read_checkpoint

__all__ = ["Continuation", "find_continuation", "newest_usable", "why_unusable"]

# what changes nothing in what is trained: length, place, machines, and how it is watched and saved
_FREE = re.compile(
    r"(imports|ckpt_path|weights_only|resume|config|model\.(collapse|channels_last|skip_nonfinite)|"
    r"data\.(num_workers|persistent_workers|download)|checkpoint\.(?!monitor|mode)\w+|"
    r"trainer\.(max_\w+|min_\w+|enable_\w+|log_every\w+|logger|profiler|default_root_dir|"
    r"devices|num_nodes|strategy|accelerator|num_sanity\w+|limit_(val|test|predict)_batches|"
    r"val_check_interval|check_val_every_n_epoch|detect_anomaly|barebones|inference_mode|benchmark|"
    r"deterministic|fast_dev_run))$|(run|wandb|report|snapshots)\."
)
_SHOWN = 4


@dataclass(frozen=True)
class Continuation:
    """What to resume.

    Attributes:
        run: the folder of the run, or None for a new one.
        checkpoint: the checkpoint to resume from, or None to begin.
        notes: what the user should know, a line each.
    """

    run: RunFolder | None
    checkpoint: Path | None
    notes: tuple[str, ...]


def find_continuation(
    parent: Path, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Continuation:
    """Look for the newest run that trains the same and has something to resume from.

    Args:
        parent: folder of the runs of one name.
        config: the present configuration, as the run folder keeps it.
        defaults: all options' default values: those of a run whose code did not know
            an option yet.

    Returns:
        That run with its newest usable checkpoint. If none that trains the same has a checkpoint,
        the newest of them from its beginning; without such a run, a new one.

    Raises:
        UsageError: the newest run with a checkpoint trains something else, and is not finished.
    """
    runs, notes = _readable(_newest_first(parent))
    differences = {
        run.path: _differences(_read_config(run), config, defaults or config) for run in runs
    }
    same = [run for run in runs if not differences[run.path]]
    for run in same:
        checkpoint, skipped = newest_usable(run.path)
        notes += skipped
        if checkpoint is not None:
            resumes = f"resume: {run.path} resumes from {checkpoint}"
            return Continuation(run, checkpoint, (*notes, resumes))
    if same:
        begins = f"resume: {same[0].path} begins again: there is no usable checkpoint"
        return Continuation(same[0], None, (*notes, begins))
    if not runs:
        nothing = f"resume: nothing in {parent} yet; a new run begins"
        return Continuation(None, None, (*notes, nothing))
    for run in runs:
        checkpoint, _ = newest_usable(run.path)
        if checkpoint is not None:
            if not _is_finished(run, checkpoint):
                raise UsageError(_refusal(run.path, checkpoint, differences[run.path]))
            break
    newest = runs[0].path
    note = f"resume: a new run begins: {newest} has other options: {_listed(differences[newest])}"
    return Continuation(None, None, (*notes, note))


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """The epochs that a training had behind it when it wrote a checkpoint's contents."""
    try:
        return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError):
        return 0


def newest_usable(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint or snapshot of a run's last step that can be read.

    Args:
        run: the run folder.

    Returns:
        The file, or None, and a line for each newer file that was skipped.
    """
    files = {path.resolve() for name in ("checkpoints", "snapshots") for path in _files(run / name)}
    notes: list[str] = []
    # a file's time says nothing once a clock was set or the folder copied
    steps = {path: _step(path) for path in files}
    for path in sorted(files, key=lambda p: (steps[p], p.stat().st_mtime_ns), reverse=True):
        if (reason := why_unusable(path)) is None:
            return path, notes
        notes.append(f"resume: skipped {path}: {reason}")
    return None, notes


def _step(checkpoint: Path) -> float:
    """The step of a checkpoint, by its name or else inside; of a broken one, above all others."""
    if (named := step_in_name(checkpoint)) >= 0:
        return named
    try:
        # "meta": without reading the tensors
        return float(torch.load(checkpoint, weights_only=True, map_location="meta")["global_step"])
    except Exception:  # `why_unusable` says why
        return math.inf


def why_unusable(checkpoint: Path) -> str | None:
    """Why training cannot resume from a file, or None; reads all of it to check its sums."""
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
    wrong = find_nonfinite(contents)
    return None if wrong is None else f"it holds values that are not finite ({wrong})"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.ckpt") if path.is_file())


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
            notes.append(f"resume: skipped {path}: {error}")
    return runs, notes


def _read_config(run: RunFolder) -> Mapping[str, Any]:
    if not run.config.is_file():
        return {"config.yaml": "missing"}
    try:
        read = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        read = None
    return read if isinstance(read, Mapping) else {"config.yaml": "unreadable"}


def _is_finished(run: RunFolder, checkpoint: Path) -> bool:
    """Whether a run's training came to its end; of a run without a record, by its last epoch."""
    if run.finished is not None:
        return run.finished
    trainer = _read_config(run).get("trainer")
    epochs = trainer.get("max_epochs") if isinstance(trainer, Mapping) else None
    return isinstance(epochs, int) and read_checkpoint(checkpoint).get("epoch", 0) + 1 >= epochs


def _refusal(run: Path, checkpoint: Path, found: list[str]) -> str:
    return (
        f"--resume auto: {run} is not finished, and trains with other options: {_listed(found)}. "
        "Give the run's options to continue it, another --run.name for a new run next to it, or "
        f"--ckpt_path {checkpoint} to continue from there with the new options"
    )


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """The options that train something else, as `name was -> is`."""
    old, new, usual = (dict(_options(values)) for values in (before, now, defaults))
    if not old.keys() & new.keys():
        return list(old) or ["config.yaml: empty"]
    pairs = {  # options that only older code had are nothing that can be given now
        name: (old.get(name, usual.get(name)), value)
        for name, value in sorted(new.items())
        if not _FREE.match(name)
    }
    return [
        f"{name} {was!r} -> {is_!r}" for name, (was, is_) in pairs.items() if not _same(was, is_)
    ]


def _options(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by name, `section.option`; a value may be a mapping, and counts as one value.

    The arguments of a class are options of its section, as where no class is named.
    """
    for section, value in values.items():
        if isinstance(value, Mapping):
            options = {k: v for k, v in value.items() if k != "init_args"}
            options |= value.get("init_args") or {}
            yield from ((f"{section}.{name}", option) for name, option in options.items())
        else:
            yield section, value


def _same(was: Any, is_: Any) -> bool:
    """Equal, or two spellings of one place that exists."""
    if was == is_:
        return True
    if not (isinstance(was, str) and isinstance(is_, str)):
        return False
    place = Path(is_).expanduser()
    return place.exists() and Path(was).expanduser().resolve() == place.resolve()
