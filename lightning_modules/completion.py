"""Tab completion by argcomplete, over the real parsers of the subcommands."""

import os
from collections.abc import Iterable

import argcomplete
from jsonargparse import ArgumentParser

__all__ = ["complete"]


def complete(commands: Iterable[str]) -> None:
    """Answer the shell and exit; only the subcommand that is being typed is imported.

    Args:
        commands: Names of all subcommands.
    """
    words = os.environ.get("COMP_LINE", "").split(" ")
    typed = words[1] if len(words) > 2 else ""
    if typed in ("fit", "validate", "test"):
        from lightning_modules.training import run

        run(typed, [])  # its parser answers, and exits
    top = ArgumentParser(prog="mobileone")
    subcommands = top.add_subcommands()
    for name in commands:
        subcommands.add_subcommand(name, _parser_of(name) if name == typed else ArgumentParser())
    argcomplete.autocomplete(top)


def _parser_of(name: str) -> ArgumentParser:
    from lightning_modules import commands

    return getattr(commands, f"{name}_parser")(name)
