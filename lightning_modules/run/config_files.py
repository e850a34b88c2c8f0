"""Configuration files by path, or by name among those that come with the package."""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.errors import UsageError

__all__ = [
    "check_configs",
    "file_that_sets",
    "find_configs",
    "option_value",
    "option_values",
    "packaged_configs",
    "value_in_configs",
]

_FLAGS = ("--config", "-c")
_ABSENT = object()


def packaged_configs() -> dict[str, Path]:
    """The recipes of the package: name, for example `imagenet/s0` -> file."""
    root = Path(str(files("configs")))
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
        if path.name != "sweep.yaml"  # which is for `wandb sweep`
    }


def find_configs(argv: list[str]) -> list[str]:
    """Replace the name of a packaged configuration by its path; files that exist come first.

    Args:
        argv: Command-line arguments.

    Returns:
        The configurations in their order, then all else: where both set an option, the command
        line counts, wherever its words are.
    """
    configs: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in _FLAGS and equals:
            configs.append(f"{flag}={_locate(value)}")
        elif flag in _FLAGS:
            configs += [word, *map(_locate, islice(words, 1))]
        else:
            rest.append(word)
    return [*configs, *rest]


def check_configs(argv: Sequence[str]) -> None:
    """Read every configuration file of a command line, so that an error names the broken one.

    Raises:
        UsageError: A file is not YAML, or not of sections.
    """
    for path in _configs(argv):
        content = _read(path)
        if not isinstance(content, dict | None):
            raise UsageError(
                f"{path} holds a {type(content).__name__}: a configuration has sections, "
                "such as `model:` with `lr: 0.1` below it"
            )


def file_that_sets(option: str, argv: Sequence[str]) -> Path | None:
    """The last configuration file of a command line that sets an option, written with dots."""
    *_, (path, _) = (None, None), *_settings(option, argv)
    return path


def value_in_configs(option: str, argv: Sequence[str]) -> Any:
    """What the last configuration file that sets an option says; None where none does."""
    *_, (_, value) = (None, None), *_settings(option, argv)
    return value


def _settings(option: str, argv: Sequence[str]) -> Iterator[tuple[Path, Any]]:
    for path in _configs(argv):
        content = _read(path)
        for key in option.split("."):
            content = content.get(key, _ABSENT) if isinstance(content, dict) else _ABSENT
        if content is not _ABSENT:
            yield path, content


def option_value(argv: list[str], *flags: str) -> str | None:
    """The last value of an option on a command line, or None.

    Args:
        argv: Command-line arguments.
        *flags: Spellings of the option.
    """
    *_, last = (None, *option_values(argv, *flags))
    return last


def option_values(argv: Sequence[str], *flags: str) -> list[str | None]:
    """All values of an option on a command line, in order; None where its value is missing."""
    values: list[str | None] = []
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        flag, equals, attached = word.partition("=")
        if flag in flags:
            values.append(attached if equals else following)
    return values


def _configs(argv: Sequence[str]) -> list[Path]:
    named = [Path(value) for value in option_values(argv, *_FLAGS) if value is not None]
    return [path for path in named if path.is_file()]


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UsageError(f"{path}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error


def _locate(value: str) -> str:
    if Path(value).is_file():
        return value
    name = value.removeprefix("configs/").removesuffix(".yaml")
    return str(packaged_configs().get(name, value))
