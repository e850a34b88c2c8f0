"""The checkpoint that a user names by `--ckpt_path`, and what follows from it."""

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.errors import UsageError
from lightning_modules.run.config_files import option_value, option_values
from lightning_modules.run.folder import RunFolder
from lightning_modules.run.parser import class_arguments, class_path
from lightning_modules.run.resume import newest_usable
from lightning_modules.run.wandb_logger import WandbOptions
from mobileone.export.checkpoint import read_checkpoint
from mobileone.io.plain_arguments import plain_arguments, registered_name

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

    It may be somebody else's: what would fetch weights, or says where a run writes, is not taken.

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
    replaced = check_run_config(found.config, _given_names(argv))
    if replaced:
        options = ", ".join(word.partition("=")[0] for word in replaced)
        rank_zero_only(print)(
            f"not taken from {found.config}, where it may come from elsewhere: {options}; give "
            f"these again, or --config {found.config}",
            file=sys.stderr,
        )
    return ["--config", str(found.config), *replaced, *(_ALL_DATA if all_data else ()), *argv]


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
    if address := _address(known.get("teacher")):
        del known["teacher"]
        if option_value(sys.argv, "--model.teacher", "--config") is None:
            raise UsageError(
                f"the checkpoint {checkpoint} names the teacher {address!r}, and no checkpoint "
                "decides what is fetched: if you trust it, give --model.teacher with it, or null"
            )
    if isinstance(known.get("model"), str):
        known["model"] = registered_name(known["model"])
    if isinstance(known.get("model_kwargs"), Mapping):
        known["model_kwargs"] = plain_arguments(known["model_kwargs"])
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
_NAME = re.compile(r"[\w.:/-]+")
_PLAIN = re.compile(r"\w*")
# of a data set: module:function, or from a hub
_FUNCTION = re.compile(r"[\w.]+:\w+|(hfds|hfids|tfds)/.*")
_PLACE = re.compile(r"[/\\~]|\.\.")  # of a file
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


def check_run_config(path: Path, given: Collection[str] = ()) -> list[str]:
    """Refuse a configuration that nobody gave and that would import code of the sender's choice.

    Values are taken as they are. Classes are taken from Lightning and this project, with arguments
    that name nothing to import and no place: some of Lightning's call what they are given.

    Args:
        path: The configuration.
        given: Names that the command line gives, so that they may be imported.

    Returns:
        Options that stand in place of what it says about where a run writes and what is fetched.

    Raises:
        ValueError: it names other classes or files, or cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): give a configuration with "
            "--config"
        ) from error
    foreign = next((name for name in _foreign(values) if name not in given), None)
    if foreign is not None:
        raise ValueError(
            f"{path}, found next to the checkpoint, names {foreign!r} to be imported and run, read "
            f"or fetched: refused, for it may be somebody else's. If you trust it: --config {path}"
        )
    return [f"--{option}={value}" for option, value in _replaced(values)]


_NOWHERE = {
    "trainer": ("logger", "profiler", "default_root_dir", "model_registry"),
    "checkpoint": ("dirpath",),
    "snapshots": ("dirpath",),
}
_UNFETCHED = {"model": "pretrained", "data": "download"}


def _replaced(values: Any) -> Iterator[tuple[str, Any]]:
    """What is not taken, and what stands in its place."""
    sections = {name: _arguments(section) for name, section in (values or {}).items()}
    for section, names in _NOWHERE.items():
        for name in names:
            if sections.get(section, {}).get(name) not in (None, True, False):
                yield f"{section}.{name}", "null"
    for section, name in _UNFETCHED.items():
        if sections.get(section, {}).get(name):
            yield f"{section}.{name}", "false"
    for field in fields(WandbOptions):
        value = sections.get("wandb", {}).get(field.name, field.default)
        if value not in (field.default, "disabled"):
            yield f"wandb.{field.name}", json.dumps(field.default).strip('"')
    if address := _address(sections.get("model", {}).get("model")):
        yield "model.model", registered_name(address)


def _arguments(section: Any) -> Mapping[str, Any]:
    """Of a section, or of the class in it."""
    if not isinstance(section, Mapping):
        return {}
    inner = section.get("init_args")
    return {**section, **(inner if isinstance(inner, Mapping) else {})}


def _address(name: Any) -> str | None:
    """A name that is looked up in a network or a folder, not in timm's registry."""
    return name if isinstance(name, str) and name != registered_name(name) else None


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
    if _PLACE.search(str(_arguments(values.get("checkpoint")).get("filename"))):
        yield str(values["checkpoint"]["filename"])
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
        both = _arguments(given)
        for dataset in (str(given.get("dataset")), str(arguments.get("dataset"))):
            if _FUNCTION.fullmatch(dataset):
                yield dataset
        yield from filter(None, [_address(both.get("teacher"))])
        if both.get("model_kwargs") != _plain_arguments(both.get("model_kwargs")):
            yield "model_kwargs"
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
    """Importable names and paths among a class's arguments; classes within are judged alone."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _words(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner, key)
    elif isinstance(value, str) and key != "class_path":
        if _IMPORTABLE.fullmatch(value) or _PLACE.search(value):
            yield value


def _plain_arguments(given: Any) -> dict[str, Any] | None:
    try:
        return plain_arguments(given) if given else given
    except (ValueError, AttributeError):
        return None


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a list, and in the lists in it."""
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
