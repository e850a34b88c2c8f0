"""The command `mobileone`: find the subcommand, and import it when it is called."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pkgutil import resolve_name

from lightning_modules.cli.commands import COMMANDS
from lightning_modules.cli.help import help_of, options_of
from lightning_modules.cli.threads import choose_waiting

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        argv: Arguments after the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: With code 2 on arguments that cannot be used.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if shell := os.environ.pop("_ARGCOMPLETE", ""):  # jsonargparse would answer, and slowly
        _complete(shell)
        return
    name, rest = _find(words)
    if name in COMMANDS and rest in _ASKS_FOR_HELP:
        print(_help_of(name, rest), end="")
        sys.exit(0)
    if name in COMMANDS:
        if name == "fit":
            _prepare_training()
        else:  # the same at each measurement, whatever the machine does
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _run(name, rest)
    elif words == ["--version"]:
        print(f"mobileone {version('mobileone-lightning')}")
    elif not rest or rest[0] in ("-h", "--help"):
        print(_help(name))
    else:
        known = ", ".join(dict.fromkeys(_next_words(name)))
        given = f"{name} {rest[0]}".strip()
        print(
            f"mobileone: error: unknown subcommand {given!r}; choose one of: {known}",
            file=sys.stderr,
        )
        sys.exit(2)


# `segment` and `detect` have a level more
_ASKS_FOR_HELP = [
    [*word, flag] for word in ((), ("fit",), ("validate",)) for flag in ("-h", "--help")
]


def _help_of(name: str, argv: list[str]) -> str:
    return help_of(" ".join([name, *argv[:-1]]), lambda: _run(name, argv))


def _prepare_training() -> None:
    if waiting := choose_waiting():  # before torch is imported
        print(waiting, file=sys.stderr)
    from mobileone.io.allocator import keep_freed_memory

    keep_freed_memory()


def _run(name: str, argv: list[str]) -> None:
    from mobileone.io.user_modules import put_current_folder_on_path

    put_current_folder_on_path()
    command = COMMANDS[name]
    if not command.show:
        resolve_name(command.function)(name.split()[-1], argv)
        return
    from lightning_modules.cli.execute import run_command

    run_command(name, command, argv)


def _find(words: Sequence[str]) -> tuple[str, list[str]]:
    """The longest beginning that is a subcommand, else a group of them, and the other words.

    A subcommand that ends with an option is one wherever that option is.
    """
    for count in (2, 1):
        name = " ".join(words[:count])
        for row in COMMANDS:
            command, _, option = row.rpartition(" ")
            if command == name and option.startswith("--") and option in words:
                rest = list(words[count:])
                rest.remove(option)
                return row, rest
        if name in COMMANDS or any(row.startswith(f"{name} ") for row in COMMANDS if name):
            return name, list(words[count:])
    return "", list(words)


def _next_words(group: str) -> list[str]:
    """What may follow a group, or the program's name."""
    at = len(group.split())
    return [row.split()[at] for row in COMMANDS if row.startswith(f"{group} ") or not group]


def _help(group: str) -> str:
    rows = {row: c.help for row, c in COMMANDS.items() if row.startswith(group)}
    width = max(map(len, rows))
    table = "\n".join(f"  {row:<{width}}  {text}" for row, text in rows.items())
    return f"""usage: mobileone {group or "SUBCOMMAND"} [options]

Train MobileOne, or any reparameterizable timm network, and ship it.

subcommands:
{table}

  -h, --help     show this help
  --version      show the version

`mobileone SUBCOMMAND --help` lists a subcommand's options. To begin:

  mobileone fit --config configs/quickstart.yaml"""


def _complete(shell: str) -> None:
    """Complete the shell's line and exit: options and their values are those of the help.

    Each subcommand has a parser of its own, so its words are taken out of the line that the shell
    sent.
    """
    import argparse

    import argcomplete

    program, *typed = os.environ["COMP_LINE"].split(" ")
    name, rest = _find(typed[:-1])  # the last word is not complete
    parser = argparse.ArgumentParser(prog="mobileone", add_help=not name)
    if name:
        os.environ["COMP_LINE"] = " ".join([program, *rest, typed[-1]])
        os.environ["COMP_POINT"] = str(int(os.environ["COMP_POINT"]) - len(name) - 1)
    if name in COMMANDS:
        parser.add_argument("words", nargs="*")
        asked = [*rest[:1], "--help"]
        shown = _help_of(name, asked if asked in _ASKS_FOR_HELP else ["--help"])
        for option, values in options_of(shown).items():
            parser.add_argument(option, choices=values or None)
    else:
        parser.add_argument("subcommand", choices=sorted(set(_next_words(name))))
    os.environ["_ARGCOMPLETE"] = shell
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    main()
