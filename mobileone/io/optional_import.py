"""Packages that only some formats need."""

import platform
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from packaging.requirements import Requirement

__all__ = ["import_optional", "require"]


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


def require(needs: Iterable[str], use: str) -> None:
    """Make sure that installed packages fit, without importing them.

    Args:
        needs: the packages, as `pip` takes them; a marker says on which machines they exist.
        use: what needs them, for the error.

    Raises:
        ImportError: one is missing or does not fit; names all, and the pip command.
    """
    needs = list(needs)
    command = " ".join(f"'{text.partition(';')[0]}'" for text in needs)
    for requirement in map(Requirement, needs):
        if requirement.marker and not requirement.marker.evaluate():
            raise ImportError(
                f"{use} needs {requirement.marker}, and this is Python "
                f"{platform.python_version()}: leave it out of `formats`"
            )
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not (found and requirement.specifier.contains(found, prereleases=True)):
            here = f"{requirement.name} {found}" if found else f"no {requirement.name}"
            raise ImportError(
                f"{use} needs {command}, and here is {here}: `pip install {command}`, or leave it "
                "out of `formats`"
            )
