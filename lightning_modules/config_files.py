"""Configuration files by path, or by name among those that come with the package."""

from importlib.resources import files
from pathlib import Path

__all__ = ["find_configs", "option_value", "packaged_configs"]

_FLAGS = ("--config", "-c")


def packaged_configs() -> dict[str, Path]:
    """The recipes of the package: name, for example `imagenet/s0` -> file."""
    root = Path(str(files("configs")))
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
    }


def find_configs(argv: list[str]) -> list[str]:
    """Replace the name of a packaged configuration by its path; files that exist come first.

    Args:
        argv: Command-line arguments.

    Returns:
        The arguments, where every `--config` names a file.
    """
    found = list(argv)
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in _FLAGS and equals:
            found[i] = f"{flag}={_locate(value)}"
        elif i and argv[i - 1] in _FLAGS:
            found[i] = _locate(word)
    return found


def option_value(argv: list[str], *flags: str) -> str | None:
    """The last value of an option on a command line, or None.

    Args:
        argv: Command-line arguments.
        *flags: Spellings of the option.
    """
    value = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        flag, equals, attached = word.partition("=")
        if flag in flags:
            value = attached if equals else following
    return value


def _locate(value: str) -> str:
    if Path(value).is_file():
        return value
    name = value.removeprefix("configs/").removesuffix(".yaml")
    return str(packaged_configs().get(name, value))
