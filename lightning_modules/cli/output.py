"""How subcommands speak: results on stdout, errors that are meant for the user on stderr."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

__all__ = ["exit_with_error", "print_table", "run_or_exit"]

T = TypeVar("T")


def run_or_exit(name: str, function: Callable[..., T], **arguments: Any) -> T:
    """Call a function whose errors are messages for the user.

    Args:
        name: The subcommand, for the message.
        function: What to call.
        **arguments: Of the function.

    Raises:
        SystemExit: With code 2, after the message, where the function raised a ValueError, OSError,
            ImportError or RejectedError.
    """
    from mobileone.export import RejectedError

    try:
        return function(**arguments)
    except (ValueError, OSError, ImportError, RejectedError) as error:
        exit_with_error(name, str(error))


def exit_with_error(name: str, message: str) -> NoReturn:
    """Print a message and exit with code 2."""
    print(f"mobileone {name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def print_table(table: Any, width: int = 150) -> None:
    """Print what rich can print; a pipe has no width of its own, and names must not be cut."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width).print(table)
