"""Words of a command line as the parser wants them: known names, and lists in brackets."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser

__all__ = ["known_name", "spell_out"]

_LISTS = (Sequence, Iterable, Collection)
# the first name is used in all commands; the others were, or are in classes that have kept them
_NAMES = (("input_size", "image_size", "size"), ("num_workers", "workers"))


def known_name(option: str, known: Collection[str]) -> str:
    """The option, else the name of the same thing that is known, else the usual one."""
    section, dot, name = option.rpartition(".")
    names = next((names for names in _NAMES if name in names), (name,))
    options = [option, *(f"{section}{dot}{other}" for other in names)]
    return next((other for other in options if other in known), options[1])


def spell_out(argv: Sequence[str], *parsers: ArgumentParser) -> list[str]:
    """Take other names of options, and lists without brackets: `--formats onnx,coreml`.

    A value without a comma gets brackets where nothing but a list is taken. What jsonargparse reads
    as it is stays: values with brackets or braces, `null`, and those of `--option+`.

    Args:
        argv: Command-line arguments.
        parsers: Those that know the options.

    Returns:
        As many arguments.
    """
    hints = {
        flag.removeprefix("--"): getattr(action, "_typehint", None)
        for parser in parsers
        for action in parser._actions
        for flag in action.option_strings
    }
    lists = {f"--{name}": h for name, h in hints.items() if _is_list(h) and name[-1] != "+"}
    return list(_bracketed([_renamed(word, hints) for word in argv], lists))


def _renamed(word: str, known: Collection[str]) -> str:
    flag, equals, value = word.partition("=")
    name = known_name(flag.removeprefix("--"), known)
    return f"--{name}{equals}{value}" if flag.startswith("--") and name in known else word


def _bracketed(argv: Sequence[str], lists: Mapping[str, Any]) -> Iterator[str]:
    before = ""
    for word in argv:
        flag, equals, value = word.partition("=")
        if before in lists:
            yield _in_brackets(word, lists[before])
        elif equals and flag in lists:
            yield f"{flag}={_in_brackets(value, lists[flag])}"
        else:
            yield word
        before = word


def _in_brackets(value: str, hint: Any) -> str:
    option = value.startswith("-") and not value[1:2].isdigit()  # the next one
    if not value or option or value[0] in "[{" or value in ("null", "None"):
        return value
    lists = list(filter(_is_iterable, _kinds(hint)))
    others = [kind for kind in _kinds(hint) if kind not in lists and not _is_mapping(kind)]
    if "," not in value and others:
        return value
    words = {item for kind in lists for item in get_args(kind)} <= {str, Path, ...}
    # YAML would read `no` as a truth value, and `photo[1].jpg` as the end of a list
    return json.dumps(value.split(",")) if words and '"' not in value else f"[{value}]"


def _is_list(hint: Any) -> bool:
    """Whether an option takes a list, and no string, which may have commas itself."""
    kinds = _kinds(hint)
    return any(map(_is_iterable, kinds)) and not {str, Any}.intersection(kinds)


def _is_iterable(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and (origin in _LISTS or issubclass(origin, (list, tuple, set)))


def _is_mapping(kind: Any) -> bool:
    return (get_origin(kind) or kind) in (dict, Mapping)


def _kinds(hint: Any) -> list[Any]:
    """The types of a union, or the one type; without None."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [] if hint is NoneType else [hint]
