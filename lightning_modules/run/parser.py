"""The parser of the command line: says what is wrong in two lines, and where it stands."""

import re
import sys
from argparse import _SubParsersAction
from collections.abc import Iterator
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.run.config_files import file_that_sets
from mobileone.io.suggest import did_you_mean

__all__ = ["Parser"]

_UNKNOWN = re.compile(r"(?:does not accept option '|unrecognized arguments: (?:--)?)([\w.+]+)")


class Parser(LightningArgumentParser):
    """Says what is wrong, without pages of usage in front."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, for an unknown option what may have been meant, and exit."""
        name = re.sub(r" \[[^]]*\]", "", self.prog)
        if unknown := _UNKNOWN.search(message):
            message = self._about_unknown(unknown[1])
            name = " ".join([name, *_subcommand(self)])
        print(f"{name}: error: {message.strip()}", file=sys.stderr)
        print(f"`{name} --help` lists all options", file=sys.stderr)
        sys.exit(2)

    def _about_unknown(self, option: str) -> str:
        file = file_that_sets(option, sys.argv)
        place = "" if file is None else f" in {file}"
        hint = did_you_mean(option, _options(self), cutoff=0.75)
        return f"there is no option {option!r}{place}{hint}"


def _subcommand(parser: LightningArgumentParser) -> list[str]:
    """The subcommand of this command line, if the parser is the one above it."""
    return [w for w in sys.argv[1:] for action in _children(parser) if w in action.choices][:1]


def _options(parser: LightningArgumentParser) -> Iterator[str]:
    """Names of a parser's options and of its subcommands'."""
    for action in parser._actions:
        if action.option_strings:
            yield action.dest
    for action in _children(parser):
        for child in action.choices.values():
            yield from _options(child)


def _children(parser: LightningArgumentParser) -> list[_SubParsersAction]:
    return [action for action in parser._actions if isinstance(action, _SubParsersAction)]
