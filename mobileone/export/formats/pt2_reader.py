"""Read a `.pt2` file without running code from it.

`torch.export.load` trusts its file: a pickle that the weights-only reader refuses is read again by
the one that runs code, compiled libraries are loaded, shapes are evaluated as Python expressions,
targets are looked up anywhere below `torch`, and names become part of generated source. Hence only
what `torch.export` writes for the networks of this project is let through, as a fresh archive.
"""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mobileone.export.formats.archive import fresh_archive, only_computes, read_records
from mobileone.io.safe_pickle import UnsafeFileError, explain_refusal

__all__ = ["load_program"]

_PROGRAM = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORDS = re.compile(
    "|".join(
        [
            r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment",
            *map(re.escape, (_PROGRAM, _SAMPLES, *_CONFIGS)),
            r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/[\w.]+",
        ]
    )
)
_OF_THE_WRITER = re.compile(r"version|\.data/.*")  # a fresh archive gets its own
_TENSOR = re.compile(r"(weight|tensor)_\d+")
_PLAIN = re.compile(r"[\w.]*")
_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.\w+")
_TARGET = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|torch\.sym_(max|min|int|float|not|ite)|math\.(ceil|floor|trunc)"
)
# of activations, divisions, padding and resizing; file names are strings too
_STRINGS = ("none", "tanh", "floor", "trunc", "constant", "reflect", "replicate", "circular")
_SYMBOL = re.compile(r"Symbol\('(s|u|zf|zuf)\d+'(, \w+=(True|False))*\)")
_SHAPE_WORDS = re.compile(
    r"\d+|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|(s|u|zf|zuf)\d+"
)
_SHAPE_MARKS = re.compile(r"[\w\s+\-*/%<>=(),]*")
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_FIX = "Export the checkpoint again: mobileone export CHECKPOINT FOLDER --formats '[torch_export]'"
# for people and debuggers, or checks in Python source: nothing that a program needs to run
_DROPPED: dict[str, Any] = {"metadata": {}, "guards_code": []}


def load_program(path: Path) -> ExportedProgram:
    """The program of a `.pt2` file.

    Raises:
        UnsafeFileError: it holds what could run code, or more than this project writes.
        ValueError: it is damaged, or no such file.
    """
    found = read_records(path, ".pt2")
    records = {name: data for name, data in found.items() if not _OF_THE_WRITER.fullmatch(name)}
    if missing := [name for name in (_PROGRAM, _SAMPLES, *_CONFIGS) if name not in records]:
        raise ValueError(
            f"{path} is not a .pt2 file that torch.export wrote: it lacks {missing[0]}"
        )
    try:
        contents = fresh_archive(_checked(records, str(path)))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r} in its description") from error
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return torch.export.load(contents)
    except Exception as error:  # whatever torch raises on an incomplete program
        first = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} is damaged, or of another version of torch: {first}") from error
    finally:
        logger.setLevel(level)


def _checked(records: dict[str, bytes], path: str) -> dict[str, bytes]:
    """The records, the program without what it does not need."""
    for name in records:
        if not _RECORDS.fullmatch(name):
            raise _refused(path, f"holds {name!r}")
    try:
        torch.load(io.BytesIO(records[_SAMPLES]), weights_only=True)
    except Exception as error:
        raise explain_refusal(records[_SAMPLES], f"{_SAMPLES} in {path}", error, _FIX) from None
    for name in _CONFIGS:
        for entry in _parsed(records, name, path)["config"].values():
            if entry.get("use_pickle") or not _TENSOR.fullmatch(str(entry["path_name"])):
                raise _refused(path, f"has an object, {entry['path_name']!r}, in {name}")
    program = _without_dropped(_parsed(records, _PROGRAM, path))
    for key, text in _texts(program):
        if not _is_harmless(key, text):
            raise _refused(path, f"has {key} {text[:80]!r} in {_PROGRAM}")
    return {**records, _PROGRAM: json.dumps(program).encode()}


def _parsed(records: dict[str, bytes], name: str, path: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(records[name])
    except ValueError as error:
        raise ValueError(f"{name} in {path} is damaged: {error}") from error
    return parsed


def _refused(path: str, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path} {what}, which no program of this project needs, and loading it could run code: "
        f"refused. {_FIX}"
    )


def _without_dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _DROPPED[k] if k in _DROPPED else _without_dropped(v) for k, v in value.items()}
    return [_without_dropped(v) for v in value] if isinstance(value, list) else value


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of the program with the key that holds it, and the keys themselves."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield "key", name
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value


def _is_harmless(key: str, text: str) -> bool:
    if key == "target":
        operator = _OPERATOR.fullmatch(text)
        return only_computes(operator[1]) if operator else bool(_TARGET.fullmatch(text))
    if key in ("in_spec", "out_spec"):
        return _is_plain_tree(text)
    if key == "expr_str":
        plain = _SYMBOL.sub("s0", text)
        words = re.findall(r"\w+", plain)
        return bool(_SHAPE_MARKS.fullmatch(plain)) and all(map(_SHAPE_WORDS.fullmatch, words))
    if key == "as_string":
        return text in _STRINGS
    if key == "name":
        return text.isidentifier() or not text
    if key == "key" and text in ("as_operator", "as_custom_obj", "as_graph"):
        return False
    return bool(_PLAIN.fullmatch(text.replace("+", "") if key == "torch_version" else text))


def _is_plain_tree(text: str) -> bool:
    """Whether a signature is of tuples, lists and dicts: other nodes may name modules to import."""
    if not text:
        return True
    try:
        _, tree = json.loads(text)
        return _is_plain_node(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _is_plain_node(node: dict[str, Any]) -> bool:
    context = json.loads(node["context"] or "null")
    plain = context is None or (
        isinstance(context, list) and all(isinstance(k, str) and k.isidentifier() for k in context)
    )
    return plain and node["type"] in _CONTAINERS and all(map(_is_plain_node, node["children_spec"]))
