"""What a file may say about the network to build: a registered name, and plain values.

timm's functions also take arguments that fetch weights from an address into a folder, and names of
addresses. A checkpoint brings its weights, so that nothing of the kind is needed to rebuild it.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg

from mobileone.io.safe_pickle import UnsafeFileError

__all__ = ["plain_arguments", "registered_name"]

# no address, no path
_TEXT = re.compile(r"[\w.,+ -]*").fullmatch


def registered_name(name: str) -> str:
    """A network's name as timm registers it, for that of an address too.

    `hf-hub:timm/resnet18.a1_in1k` is what `resnet18.a1_in1k` builds, with other weights.
    """
    return re.split(r"[/:\\]", name)[-1].partition("@")[0] if {":", "/"} & set(name) else name


def plain_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of `timm.create_model` that reach the network's constructor.

    Those of timm's own loading are left out.

    Args:
        arguments: as a file brings them; None for none.

    Raises:
        UnsafeFileError: a value is neither a number nor a word, nor a list or mapping of these.
    """
    loading = {
        name
        for function in (timm.create_model, build_model_with_cfg)
        for name in inspect.signature(function).parameters
    }
    kept = {name: value for name, value in (arguments or {}).items() if name not in loading}
    for name, value in kept.items():
        if not _is_plain(value):
            raise UnsafeFileError(
                f"`model_kwargs` of the file has {name}={value!r}, and only numbers, words, and "
                "lists and mappings of these are taken from a file: refused"
            )
    return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return bool(_TEXT(value))
    return value is None or isinstance(value, int | float)
