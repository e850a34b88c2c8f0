"""Tab completion by argcomplete, over the real parsers of the subcommands."""

import argparse
import os
from collections.abc import Iterable

import argcomplete

__all__ = ["complete"]


def complete(commands: Iterable[str]) -> None:
    """Answer the shell and exit; only the subcommand that is being typed is imported.

    jsonargparse answers for a parser on its own, so the subcommand's word is taken out of the
    line that the shell sent.

    Args:
        commands: Names of all subcommands.
    """
    program, _, rest = os.environ["COMP_LINE"].partition(" ")
    name, typed, arguments = rest.partition(" ")
    if not typed or name not in commands:
        parser = argparse.ArgumentParser(prog="mobileone")
        parser.add_argument("subcommand", choices=list(commands))
        argcomplete.autocomplete(parser)
        return
    os.environ["COMP_LINE"] = f"{program} {arguments}"
    os.environ["COMP_POINT"] = str(int(os.environ["COMP_POINT"]) - len(name) - 1)
    if name in ("fit", "validate", "test"):
        from lightning_modules.training import run

        run(name, [])
    else:
        from lightning_modules import commands as others

        getattr(others, f"{name}_parser")(name).parse_args([])
