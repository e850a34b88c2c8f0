"""Packages that only some formats need."""

import platform
from collections.abc import Iterable, Mapping
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
        ImportError: it is not installed, or was built for another PyTorch; names the pip command.
    """
    name = package.partition(".")[0]
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        missing = f"{use} needs the package `{name}`: `pip install '{install}'`"
        raise ImportError(missing) from error
    except ImportError as error:  # of a library that lacks a symbol, for example
        pair = f"`{name}` {_version(name)} and PyTorch {_version('torch')}"
        raise ImportError(
            f"{use} needs packages that fit each other, and {pair} do not "
            f"({str(error).partition(chr(10))[0]}): `pip install '{install}'`"
        ) from error


def require(needs: Mapping[str, Iterable[str]], kind: str) -> None:
    """Make sure that installed packages fit, without importing them.

    Args:
        needs: by what needs them, the packages, as `pip` takes them; a marker says on which
            machines they exist.
        kind: what needs them, for the error.

    Raises:
        ImportError: one is missing or does not fit; names all that lack one, and the pip command.
    """
    lacking, install = [], []
    for name, texts in needs.items():
        requirements = {text.partition(";")[0]: Requirement(text) for text in texts}
        if wrong := [text for requirement in requirements.values() if (text := _lack(requirement))]:
            lacking.append(f"`{name}` ({', '.join(wrong)})")
            install += [f"'{text}'" for text, r in requirements.items() if _exists(r)]
    if lacking:
        command = " ".join(dict.fromkeys(install))
        fix = f"`pip install {command}`, or " if command else ""
        raise ImportError(
            f"{kind} without their packages: {', '.join(lacking)}: {fix}leave them out of `{kind}`"
        )


def _lack(requirement: Requirement) -> str:
    """What is here in place of a package; empty where it fits."""
    if not _exists(requirement):
        return f"needs {requirement.marker}, and this is Python {platform.python_version()}"
    found = _version(requirement.name)
    if not found:
        return f"here is no {requirement.name}"
    fits = requirement.specifier.contains(found, prereleases=True)
    return "" if fits else f"here is {requirement.name} {found}"


def _exists(requirement: Requirement) -> bool:
    """Whether there is such a package for this machine."""
    return requirement.marker is None or requirement.marker.evaluate()


def _version(package: str) -> str:
    """That of an installed package; empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
