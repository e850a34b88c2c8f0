"""Help of subcommands, kept from call to call: making it imports torch, timm and Lightning."""

import hashlib
import io
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

__all__ = ["help_of", "options_of"]

_PACKAGES = ("mobileone", "callbacks", "lightning_modules")
_ROOT = Path(__file__).parents[2]
_OPTION = re.compile(r"^  (?:-\w(?: \w+)?, )?(--[\w.]+)(?: \{(.*?)\})?", re.MULTILINE)


def help_of(name: str, print_help: Callable[[], object]) -> str:
    """The help of a subcommand, from the user's cache if nothing has changed since it was made.

    It is made again when a source file, the installed packages, Python or the terminal's width
    are not the same.

    Args:
        name: The subcommand, which names the file.
        print_help: Prints it, and may exit.

    Raises:
        SystemExit: `print_help` failed.
    """
    state = _state()
    path = _folder() / f"{name}.txt"
    with suppress(OSError, UnicodeDecodeError):
        if path.is_file():  # a named pipe would be waited for
            known, _, text = path.read_text(encoding="utf-8").partition("\n")
            if known == state:
                return text
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            print_help()
    except SystemExit as stop:
        if stop.code:
            raise
    with suppress(OSError):  # a read-only home
        from mobileone.io.atomic import replace_text

        replace_text(path, f"{state}\n{printed.getvalue()}")
    return printed.getvalue()


def options_of(text: str) -> dict[str, list[str]]:
    """The options that a help lists, each with the values that it may have, if those are listed."""
    return {option: values.split(",") if values else [] for option, values in _OPTION.findall(text)}


def _folder() -> Path:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home: below a file nothing is kept
        return Path(os.devnull)
    # each installation has its own
    return cache / "mobileone" / f"help-{_hash(sys.prefix, _ROOT)}"


def _state() -> str:
    """A hash of all that decides what a help says."""
    sources = sorted(file for package in _PACKAGES for file in (_ROOT / package).rglob("*.py"))
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    installed = Path(sysconfig.get_path("purelib")).stat().st_mtime_ns  # names hold versions
    return _hash(sys.version, installed, shutil.get_terminal_size().columns, stats)


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
