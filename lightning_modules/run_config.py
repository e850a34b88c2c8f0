"""The configuration beside a checkpoint, which may have come with it from somebody else."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["check_run_config"]

_OWN = ("lightning.pytorch.", "callbacks.", "lightning_modules.", "mobileone.")
_IMPORTING = ("callbacks", "logger", "plugins", "profiler", "strategy", "accelerator")
_PLAIN = re.compile(r"\w*")
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


def check_run_config(path: Path) -> None:
    """Refuse a configuration that nobody gave and that would import code of the sender's choice.

    Values are taken as they are. Classes are taken from Lightning and this project, with arguments
    that name nothing to import: some of Lightning's call what they are given.

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
    foreign = next(_foreign(values), None)
    if foreign is not None:
        raise ValueError(
            f"{path}, found beside the checkpoint, names {foreign!r} to be imported and run: "
            f"refused, for it may be somebody else's. If you trust it: --config {path}"
        )


def _foreign(values: Any) -> Iterator[str]:
    """What would be imported, or read from another file."""
    if not isinstance(values, Mapping):
        yield str(values)
        return
    trainer = values.get("trainer") or {}
    if "config" in values or not isinstance(trainer, Mapping):
        yield str(values.get("config", trainer))
        return
    for name in _IMPORTING:
        for item in _listed(trainer.get(name)):
            # a string with a dot or a slash is the path of a class or of a file
            if isinstance(item, str) and not _PLAIN.fullmatch(item):
                yield item
    yield from _classes(values)


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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
