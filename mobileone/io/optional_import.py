"""Packages that only some formats need."""

from importlib import import_module
from types import ModuleType

__all__ = ["import_optional"]


def import_optional(package: str, use: str, install: str) -> ModuleType:
    """Import `package`.

    Args:
        package: name to import.
        use: what needs it, for the error.
        install: what to hand to `pip install`.

    Raises:
        ImportError: it is not installed; names the pip command.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{use} needs the package `{package.partition('.')[0]}`: "
            f"`pip install '{install}'`, or leave it out of `formats`"
        ) from error
