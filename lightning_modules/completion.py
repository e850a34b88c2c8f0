"""Tab completion by argcomplete, over the real parsers of the subcommands."""

import argparse
import os
from collections.abc import Mapping
from importlib import import_module

import argcomplete

__all__ = ["complete"]


def complete(commands: Mapping[str, str]) -> None:
    """Answer the shell and exit; only the subcommand that is being typed is imported.

    jsonargparse answers for a parser on its own, so the subcommand's word is taken out of the
    line that the shell sent.

    Args:
        commands: Where the function of each subcommand is, as `module:function`; beside it is
            `<subcommand>_parser`.
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
        from lightning_modules.run.fit import run

        run(name, [])
    elif name not in ("segment", "detect"):  # whose parser is LightningCLI's own
        module = import_module(commands[name].partition(":")[0])
        getattr(module, f"{name}_parser")(name).parse_args([])
