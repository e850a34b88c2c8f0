"""Run a subcommand: a parser from a function's signature, its call, and its result."""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.cli.commands import Command
from lightning_modules.cli.output import print_result
from lightning_modules.run.option_words import spell_out
from lightning_modules.run.warning_filters import silence_known_messages
from mobileone.bench.results import Result
from mobileone.io.user_modules import import_user_modules

__all__ = ["run_command"]

_LISTS = {  # arguments that are given as words
    "models": "names of timm's models, or torchvision's with the prefix torchvision/",
    "artifact": "artifact folders, or files of them",
}


def run_command(name: str, command: Command, argv: list[str]) -> None:
    """Parse arguments, call the function, print and save what it returns.

    Parameters without a default are positional arguments, and so are `models` and `artifact`; the
    others are options. A function that returns a `Result` also gets `--output`, the folder where
    it is saved, and `--against`, an earlier result to compare with. Every command gets `--imports`.

    Args:
        name: The subcommand, for messages.
        command: Its row.
        argv: Its arguments.

    Raises:
        SystemExit: With code 2 after a message on arguments that cannot be used, where the function
            raises a ValueError, OSError, ImportError or RejectedError; with 1 where an artifact's
            files are not those that were written, or some of those asked for were left out.
    """
    silence_known_messages()
    function = resolve_name(command.function)
    parser = _parser(name, command, function)
    words = spell_out(_first_in_place(command.first, argv), parser)
    options = parser.parse_args(words)
    from mobileone.export import RejectedError
    from mobileone.export.inspect import ChecksumMismatchError

    try:
        _call(name, command, function, options.as_dict())
    except ChecksumMismatchError as error:
        print(error)
        sys.exit(1)
    except (ValueError, OSError, ImportError, RejectedError) as error:
        print(f"mobileone {name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser(name: str, command: Command, function: Callable[..., Any]) -> ArgumentParser:
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    parser = ArgumentParser(
        prog=f"mobileone {name}",
        description=f"{summary} Example: mobileone {name} {command.example}",
    )
    parameters = inspect.signature(function).parameters
    for several in _LISTS.keys() & parameters.keys():
        default = parameters[several].default
        parser.add_argument(
            several, nargs="*", type=str, help=_LISTS[several],
            default=[] if default is inspect.Parameter.empty else list(default),
        )  # fmt: skip
    parser.add_function_arguments(function, as_positional=True, as_group=False, skip={*_LISTS})
    if command.first:
        parser.add_argument(command.first, help="the first argument, in any place")
    if _measures(function):
        if "output" not in parameters:
            parser.add_argument(
                "--output", type=str | None, default=None,
                help="folder for the result, as JSON and CSV, and its chart; null: print only",
            )  # fmt: skip
        parser.add_argument(
            "--against", type=str | None, default=None,
            help="an earlier result of this machine (a JSON file), to print the change since",
        )  # fmt: skip
    parser.add_argument(
        "--imports", type=list[str], default=[],
        help="modules of your own, which register networks, formats or runtimes",
    )  # fmt: skip
    return parser


def _first_in_place(option: str, argv: list[str]) -> list[str]:
    """The arguments, with the value of an option as the first of them."""
    if not option:
        return argv
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument(option, dest="value")
    found, rest = named.parse_known_args(argv)
    return argv if found.value is None else [found.value, *rest]


def _measures(function: Callable[..., Any]) -> bool:
    return inspect.signature(function).return_annotation is Result


def _call(
    name: str, command: Command, function: Callable[..., Any], options: dict[str, Any]
) -> None:
    from mobileone.export import Manifest

    import_user_modules(options.pop("imports"))
    options.pop(command.first.removeprefix("--"), None)
    if not _measures(function):
        result = function(**options)
        print_result(resolve_name(command.show)(result))
        if "directory" in options:
            print(f"-> {Path(options['directory'])}")
        if isinstance(result, Manifest) and result.rejected:
            sys.exit(1)
        return
    kind = name.split()[-1].removeprefix("--")
    against, output = options.pop("against"), options["output"]
    if "output" not in inspect.signature(function).parameters:
        del options["output"]
    _check_output(output, kind)
    before = None if against is None else Result.load(against, kind)
    _show_progress()
    result = function(**options)
    print_result(resolve_name(command.show)(result))
    if output is not None:
        files = result.save_all(output)
        if command.figure:
            from mobileone.bench.show.charts import save_figure

            files += save_figure(resolve_name(command.figure)(result), Path(output) / kind)
        print(", ".join(map(str, files)))
    if before is not None:
        from mobileone.bench.show.tables import change_table

        print_result(change_table(before, result))


def _check_output(output: str | None, kind: str) -> None:
    path = Path(output or ".")
    if path.is_file() or path.suffix in (".json", ".csv"):
        raise ValueError(
            f"`output` (={output!r}) must be a folder, into which {kind}.json and {kind}.csv are "
            f"written: give {str(path.parent)!r}"
        )


def _show_progress() -> None:
    """Report progress on stderr, where a person may be waiting."""
    logger = logging.getLogger("mobileone.bench")
    if sys.stderr.isatty() and not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
