"""The parser of the command line: errors of two lines, which name the file and the option."""

import re
import sys
from argparse import SUPPRESS, HelpFormatter, _SubParsersAction
from collections.abc import Iterator
from importlib import import_module
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.run.config_files import file_that_sets
from lightning_modules.run.option_words import known_name
from mobileone.io.suggest import did_you_mean

__all__ = ["Parser", "class_arguments", "class_parser", "class_path", "is_class"]

_UNKNOWN = re.compile(r"(?:does not accept option '|unrecognized arguments: (?:--)?)([\w.+]+)")
_IN_CLASS = re.compile(
    r'key "(?P<key>\w+)":.*given class_path \'(?P<path>[\w.]+)\':\s*(?P<reason>.*?)\s*'
    r"(?:- Expected a <class 'NoneType'>.*)?\Z",
    re.DOTALL,
)
_WRONG_VALUE = re.compile(
    r'Parser key "([\w.]+)":\s+(?:Expected a |Does not validate[^\[]+)'
    r"(typing\.Literal[^\]]+\]|\[?(?:<class '\w+'>(?:, )?)+).*?\bvalue: ([^\n]*)",
    re.DOTALL,
)
_SEVERAL = re.compile(
    r'Parser key "([\w.]+)":.*\n  Errors:\n(.*)\n  Given value type:.*\n  Given value: (.*)',
    re.DOTALL,
)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
    "Iterable": "a list",
}
_UNKNOWN_IN_CLASS = re.compile(r"Option '([\w.]+)' is not accepted")


class Parser(LightningArgumentParser):
    """Says what is wrong, without pages of usage in front."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, for an unknown option what may have been meant, and exit."""
        if not self.exit_on_error:  # jsonargparse tries whether a value fits
            super().error(message, ex)
        name = re.sub(r" \[[^]]*\]", "", self.prog)
        more = "--help"
        if unknown := _UNKNOWN.search(message):
            message = self._about_unknown(unknown[1], set(_options(self)))
            name = " ".join([name, *_subcommand(self)])
        elif found := _IN_CLASS.search(message):
            more = f"--{found['key']}.help {found['path']}"
            message = self._about_class(**found.groupdict())
        elif wrong := _WRONG_VALUE.search(message):
            outer, option = re.findall(r'Parser key "([\w.]+)"', message)[0], wrong[1]
            option = option if option == outer else f"{outer}.{option}"  # of a class
            message = _about_value(option, wrong[2], wrong[3])
        elif "does not correspond to a subclass" in message:
            message = re.sub(r"(?s)\A.*(Import path[^\n]*).*\Z", r"\1", message)
        elif (several := _SEVERAL.search(message)) and "Problem with" not in message:
            message = _about_several(*several.groups()) or message
        print(f"{name}: error: {message.strip()}", file=sys.stderr)
        print(f"`{name} {more}` lists all options", file=sys.stderr)
        sys.exit(2)

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """As the base class; then the options of the model and of the data that are the default."""
        defaults = self.get_defaults(skip_validation=True)
        paths = {section: defaults.get(f"{section}.class_path") for section in ("model", "data")}
        shown = super().format_help(formatter)
        return "\n".join([shown, *map(_class_help, paths, paths.values())])

    def _about_class(self, key: str, path: str, reason: str) -> str:
        """What is wrong with an argument of a class, or with the class."""
        unknown = _UNKNOWN_IN_CLASS.fullmatch(reason)
        if wrong := _WRONG_VALUE.fullmatch(reason):
            return _about_value(f"{key}.{wrong[1]}", wrong[2], wrong[3])
        if unknown is None:
            return f"--{key} {path}: {' '.join(reason.split())}"
        options = {f"{key}.{name}" for name in class_arguments(path)}
        return self._about_unknown(f"{key}.{unknown[1]}", options)

    def _about_unknown(self, option: str, options: set[str]) -> str:
        section, _, rest = option.partition(".")
        file = file_that_sets(option, sys.argv)
        file = file or file_that_sets(f"{section}.init_args.{rest}", sys.argv)
        place = "" if file is None else f" in {file}"
        hint = did_you_mean(known_name(option, options), options, cutoff=0.75)
        return f"there is no option {option!r}{place}{hint}"


def _about_value(option: str, expected: str, given: str) -> str:
    """What an option takes, in place of jsonargparse's words."""
    names = re.findall(r"'(\w+)'", expected)
    if "Literal" in expected:
        rule = f"one of {', '.join(names)}{did_you_mean(given, names)}"
    else:
        rule = " or ".join(_KINDS.get(name, f"of type {name}") for name in names)
    return f"--{option} {given} must be {rule}"


def _about_several(option: str, expected: str, given: str) -> str:
    """The same of an option that takes values of several kinds; empty: they are not named."""
    rules: list[str] = []
    for kind in re.findall(r"Expected a (.*)", expected):
        if "Literal" in kind:
            rules += [name.strip("' ") for name in kind.partition("[")[2].strip("]").split(",")]
        elif "import path" in kind:
            rules.append("the path of a class")
        else:
            name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", kind)
            rules.append(_KINDS.get(name, name))
    *rest, last = dict.fromkeys(rules) or [""]
    return f"--{option} {given} must be {', '.join(rest)} or {last}" if rest else ""


def class_path(kind: type) -> str:
    """The path by which a class is imported, where it is defined."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_arguments(path: str) -> set[str]:
    """Names of a class's arguments; none if there is no such class, as parsing it says."""
    if not is_class(path):
        return set()
    return set(ArgumentParser().add_class_arguments(_class(path), fail_untyped=False))


def class_parser(section: str, path: str) -> ArgumentParser:
    """A parser of the options `--<section>.…` of a class."""
    parser = ArgumentParser(usage=SUPPRESS, add_help=False)
    parser.add_class_arguments(_class(path), section, fail_untyped=False)
    return parser


def is_class(path: str) -> bool:
    """True if a class can be imported by this path."""
    try:
        return isinstance(_class(path), type)
    except (ImportError, AttributeError, ValueError):
        return False


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    kind: type = getattr(import_module(module), name)
    return kind


def _class_help(section: str, path: str | None) -> str:
    """The options `--<section>.…` of a class, as a parser's help lists them."""
    return "" if path is None else class_parser(section, path).format_help()


def _subcommand(parser: LightningArgumentParser) -> list[str]:
    """The subcommand of this command line, if the parser is the one above it."""
    return [w for w in sys.argv[1:] for action in _children(parser) if w in action.choices][:1]


def _options(parser: LightningArgumentParser) -> Iterator[str]:
    """Names of a parser's options, those of its default classes too, and of its subcommands'."""
    for name in parser.get_defaults(skip_validation=True).keys():
        yield name.replace(".init_args.", ".")
    for action in _children(parser):
        for child in action.choices.values():
            yield from _options(child)


def _children(parser: LightningArgumentParser) -> list[_SubParsersAction]:
    return [action for action in parser._actions if isinstance(action, _SubParsersAction)]
