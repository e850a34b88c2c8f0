"""Modules of the user's own, imported so that they register networks, formats and runtimes."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = [
    "import_user_module",
    "import_user_modules",
    "imported_user_modules",
    "put_current_folder_on_path",
]

_imported: dict[str, None] = {}


def put_current_folder_on_path() -> None:
    """Let the modules of the current folder be imported, as `python -m` does."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))


def import_user_modules(names: Sequence[str]) -> None:
    """Import modules for what they register: timm models, rows of `FORMATS` or `RUNTIMES`.

    They run as the user's own code, so their names come from a command line or from a
    configuration that was given on it, and never from a checkpoint or from a file next to one.

    Args:
        names: Dotted names, for example `my_networks`. The current folder is searched too.

    Raises:
        ValueError: A module is not found; the error says where it was looked for.
    """
    for name in names:
        import_user_module(name, "imports")
        _imported[name] = None


def import_user_module(name: str, option: str) -> ModuleType:
    """Import one module; the current folder is searched too.

    Args:
        name: Dotted name, for example `my_data`.
        option: The option that names it, for the error.

    Raises:
        ValueError: It is not found, and the error says where it was looked for; it is not Python,
            or a module that it imports is missing.
    """
    put_current_folder_on_path()
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"`{option}` names {name!r}, which is not a module's name, as my_module is"
        )
    try:
        return import_module(name)
    except SyntaxError as error:
        raise ValueError(
            f"`{option}` names {name!r}, which is not Python: {error.filename}, line "
            f"{error.lineno}: {error.msg}"
        ) from error
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(
                f"`{option}` names {name!r}, which imports {error.name!r}, and there is no such "
                "module: install its package"
            ) from error
        raise ValueError(
            f"`{option}` names {name!r}, and there is no such module: run the command in the "
            f"folder that holds {name.partition('.')[0]}.py (now: {Path.cwd()}), install its "
            "package, or set PYTHONPATH"
        ) from error


def imported_user_modules() -> tuple[str, ...]:
    """The names that `import_user_modules` has imported, in order: a subprocess needs them too."""
    return tuple(_imported)
