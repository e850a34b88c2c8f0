"""The checkpoint that a user names by `--ckpt_path`, and what follows from it."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.errors import UsageError
from lightning_modules.run.config_files import option_value, option_values
from lightning_modules.run.folder import RunFolder
from lightning_modules.run.parser import class_arguments, class_path
from lightning_modules.run.resume import newest_usable
from mobileone.export.checkpoint import read_checkpoint

__all__ = ["check_run_config", "hyper_parameters", "load_ckpt_arg", "prepend_run_config"]

_ALL_DATA = (
    "--trainer.limit_val_batches=1.0",
    "--trainer.limit_test_batches=1.0",
    "--trainer.overfit_batches=0",
)

# what the data decide, what is done once, and what Lightning adds
_OF_THE_DATA = ("num_classes", "in_chans", "pretrained", "weights", "_instantiator")


def prepend_run_config(argv: list[str], all_data: bool) -> list[str]:
    """Put the configuration of `--ckpt_path`'s run before arguments that give none.

    Args:
        argv: Of the subcommand.
        all_data: Whether all data are wanted, whatever limits the run had.

    Raises:
        UsageError: It may not be read, see `check_run_config`.
    """
    checkpoint = option_value(argv, "--ckpt_path")
    if checkpoint is None or option_value(argv, "--config", "-c") is not None:
        return argv
    if "auto" in option_values(argv, "--resume")[:-1]:
        return argv  # a process that a resuming run has started: it has that command's options
    found = RunFolder.of_checkpoint(checkpoint)
    if found is None or not found.config.is_file():
        return argv
    check_run_config(found.config, _given_names(argv))
    return ["--config", str(found.config), *(_ALL_DATA if all_data else ()), *argv]


def _given_names(argv: list[str]) -> set[str]:
    """The modules, classes and functions of the user's own that a command line names itself."""
    flags = ("model", "model.class_path", "data", "data.class_path", "data.dataset", "imports")
    values = (option_values(argv, f"--{flag}") for flag in flags)
    return {name for words in values for word in words for name in _NAME.findall(str(word))}


def hyper_parameters(
    checkpoint: str, given: str | None, default: type, program: str
) -> dict[str, Any]:
    """Arguments of the model that a checkpoint was trained with, less those of the data.

    The class is never taken from the checkpoint: its file would then choose what is imported.

    Args:
        checkpoint: Its path.
        given: The class that the user names, of whose arguments those are returned that it takes.
        default: The class where none is named, which must be the one that was trained.
        program: What trains the default class, for the message.

    Raises:
        UsageError: The checkpoint cannot be read, or is of another class than the default.
    """
    found = dict(load_ckpt_arg(checkpoint).get("hyper_parameters", {}))
    trained = found.pop("_class_path", class_path(default))
    known = {k: v for k, v in found.items() if k not in _OF_THE_DATA}
    if given is None and not trained.startswith(_OURS):
        raise UsageError(
            f"the checkpoint {checkpoint} is of the class {trained}, and a checkpoint does not "
            f"choose what is imported: if you trust its code, give --model {trained}"
        )
    foreign = next(_classes(known), None)
    if foreign is not None:
        raise UsageError(
            f"the checkpoint {checkpoint} names {foreign!r} to be imported and run: refused, for a "
            "checkpoint holds values and tensors"
        )
    taken = class_arguments(given or class_path(default))
    unknown = sorted(set(known) - taken)
    if given is None and unknown:
        raise UsageError(
            f"the checkpoint {checkpoint} is not of `{program}`, which has no {unknown[0]!r}"
        )
    return {k: v for k, v in known.items() if k in taken}


def load_ckpt_arg(checkpoint: str) -> dict[str, Any]:
    """The contents of the checkpoint that the user names.

    Raises:
        UsageError: It cannot be read; the message names the run's newest one that can.
    """
    try:
        return read_checkpoint(Path(checkpoint))
    except ValueError as error:
        raise UsageError(_with_another(error, checkpoint)) from error


def _with_another(error: ValueError, checkpoint: str) -> str:
    """The error, with an older checkpoint of the run if one can be read."""
    run = RunFolder.of_checkpoint(checkpoint)
    other = None if run is None else newest_usable(run.path)[0]
    if other is None:
        return str(error)
    return f"{error}\nthe newest checkpoint of this run that can be read is {other}"


_OURS = ("lightning_modules.", "mobileone.")
_OWN = ("lightning.pytorch.", "callbacks.", *_OURS)
_IMPORTING = ("callbacks", "logger", "plugins", "profiler", "strategy", "accelerator")
_NO_SECTIONS = ("ckpt_path", "imports", "resume", "seed_everything", "verbose", "weights_only")
_NAME = re.compile(r"[\w.:]+")
_PLAIN = re.compile(r"\w*")
_FUNCTION = re.compile(r"[\w.]+:\w+")  # of a data set, as module:function
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


def check_run_config(path: Path, given: Collection[str] = ()) -> None:
    """Refuse a configuration that nobody gave and that would import code of the sender's choice.

    Values are taken as they are. Classes are taken from Lightning and this project, with arguments
    that name nothing to import: some of Lightning's call what they are given.

    Args:
        path: The configuration.
        given: Names that the command line gives, so that they may be imported.

    Raises:
        ValueError: it names other classes or files, or cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): give a configuration with "
            "--config"
        ) from error
    foreign = next((name for name in _foreign(values) if name not in given), None)
    if foreign is not None:
        raise ValueError(
            f"{path}, found next to the checkpoint, names {foreign!r} to be imported and run: "
            f"refused, for it may be somebody else's. If you trust it: --config {path}"
        )


def _foreign(values: Any) -> Iterator[str]:
    """What would be imported, or read from another file."""
    if not isinstance(values, Mapping):
        yield str(values)
        return
    yield from _other_spellings(values)
    yield from map(str, _leaves(values.get("imports") or []))
    for section in ("model", "data"):
        yield from _foreign_in_section(values.get(section))
    for name, section in values.items():
        if name not in _NO_SECTIONS and not isinstance(section, Mapping | None):
            yield str(section)  # another file
    trainer = values.get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    for item in _leaves([trainer.get(name) for name in _IMPORTING]):
        # a string with a dot or a slash is the path of a class or of a file
        if isinstance(item, str) and not _PLAIN.fullmatch(item):
            yield item
    rest = {key: value for key, value in values.items() if key not in ("model", "data")}
    yield from _classes(rest)


def _other_spellings(value: Any) -> Iterator[str]:
    """Keys by which jsonargparse takes an option in another way than a saved configuration has it.

    `data.dataset` at the top, `callbacks+`, `dict_kwargs`: what is judged below are plain keys.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not _PLAIN.fullmatch(str(key)) or key == "dict_kwargs":
                yield str(key)
            yield from _other_spellings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _other_spellings(inner)


def _foreign_in_section(section: Any) -> Iterator[str]:
    """Classes and functions that the model or the data name; our own take nothing to import."""
    if not isinstance(section, Mapping | None):  # a class, or another file
        yield str(section)
        return
    given = section or {}
    arguments = given.get("init_args", given)
    if not str(given.get("class_path", _OURS[0])).startswith(_OURS):
        yield str(given["class_path"])
    if isinstance(arguments, Mapping):
        for dataset in (str(given.get("dataset")), str(arguments.get("dataset"))):
            if _FUNCTION.fullmatch(dataset):
                yield dataset
        yield from _classes(arguments)


def _classes(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            path = str(value["class_path"])
            if not path.startswith(_OWN):
                yield path
            yield from _words(value)
        for inner in value.values():
            yield from _classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _classes(inner)


def _words(value: Any, key: str = "") -> Iterator[str]:
    """Importable names among the arguments of a class; classes within are judged on their own."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _words(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner, key)
    elif isinstance(value, str) and key != "class_path" and _IMPORTABLE.fullmatch(value):
        yield value


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a list, and in the lists in it."""
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
