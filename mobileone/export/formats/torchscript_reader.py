"""Read a TorchScript file that can do nothing but compute.

TorchScript runs no Python, but its code may call operators on files and classes of extensions, and
some of its methods run while it is loaded. Hence its code is parsed here before PyTorch sees it,
every call is looked at, and PyTorch gets what was parsed, as a fresh archive.
"""

import ast
import io
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path

from mobileone.export.formats.archive import fresh_archive, only_computes, read_records
from mobileone.io.safe_pickle import UnsafeFileError

__all__ = ["harmless_archive"]

_RECORDS = re.compile(
    r"(data|constants)\.pkl|(data|constants)/\d+|code/[\w/]+\.py|extra/[\w.]+|byteorder"
)
# of the writer, or for debuggers: nothing that a module needs to run
_DROPPED = re.compile(r"version|\.data/.*|.*\.debug_pkl|traced_inputs(\.pkl|/\d+)")
_GLOBALS = re.compile(
    r"__torch__\.(?!torch\.classes\.)[\w.]+|torch\._utils\._rebuild_tensor_v2|torch\.\w+Storage"
    r"|collections\.OrderedDict|torch\.jit\._pickle\.\w+"
).fullmatch
_NAMING = ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID")
_NODES = (
    *(ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Expr),
    *(ast.Assign, ast.AnnAssign, ast.If, ast.For, ast.While, ast.Pass),
    *(ast.Call, ast.keyword, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant),
    *(ast.List, ast.Tuple, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.expr_context, ast.unaryop, ast.operator, ast.boolop, ast.cmpop),
)
_FUNCTIONS = ("annotate", "bool", "float", "getattr", "int", "range", "unchecked_cast")
_ON_MODULES = re.compile(r"forward\d*").fullmatch
_TEXT = re.compile(r"[\w.,> -]*").fullmatch
_EXTENSIONS = "__torch__.torch.classes."
_FIX = "Export the checkpoint again: mobileone export CHECKPOINT FOLDER"


def harmless_archive(path: Path) -> io.BytesIO:
    """The file as a fresh archive for `torch.jit.load`.

    Raises:
        UnsafeFileError: it holds or calls what could reach beyond its own tensors.
        ValueError: it is damaged, or no such file.
    """
    records = read_records(path, "TorchScript")
    if "constants.pkl" not in records or "data.pkl" not in records:
        raise ValueError(f"{path} is damaged, or not a TorchScript file: it has no module")
    kept = {name: data for name, data in records.items() if not _DROPPED.fullmatch(name)}
    for name, data in kept.items():
        if not _RECORDS.fullmatch(name):
            raise _refused(path, f"holds {name!r}")
        if foreign := next(_foreign_objects(data), None) if name.endswith(".pkl") else None:
            raise _refused(path, f"names {foreign!r} in {name}")
        if name.endswith(".py"):
            kept[name] = f"{_judged(data, path)}\n".encode()
    return fresh_archive(kept, int(records.get("version", b"3")))


def _refused(path: Path, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path} {what}, which could reach files or run code beyond the network: refused. {_FIX}"
    )


def _foreign_objects(stream: bytes) -> Iterator[str]:
    """What a pickle names beyond tensors and the classes of the code."""
    try:
        for operation, argument, _ in pickletools.genops(stream):
            name = str(argument).replace(" ", ".")
            if operation.name in _NAMING or (operation.name == "GLOBAL" and not _GLOBALS(name)):
                yield name
    except Exception as error:  # what this reader cannot follow
        yield str(error)


def _judged(source: bytes, path: Path) -> str:
    """The code as it was understood, without comments and line continuations."""
    try:
        tree = ast.parse(source.decode("ascii"))
        foreign = next(_foreign_code(tree), None)
        text = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(path, f"has code that cannot be checked ({error})") from error
    if foreign is not None:
        raise _refused(path, f"calls or names {foreign!r}")
    return text


def _foreign_code(tree: ast.AST) -> Iterator[str]:
    judged = set()  # the `torch` and `ops` of calls: a function may not be passed around
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not _is_harmless_call(node.func):
                yield ast.unparse(node.func)
            judged.add(_root(node.func))
        elif isinstance(node, ast.Name) and node.id in ("torch", "ops") and node not in judged:
            yield node.id
        elif not isinstance(node, _NODES) or getattr(node, "decorator_list", None):
            yield type(node).__name__
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(_EXTENSIONS):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and not _TEXT(str(node.value)):
            yield str(node.value)


def _is_harmless_call(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _FUNCTIONS
    if not isinstance(function, ast.Attribute):
        return False
    root = _root(function)
    name = root.id if isinstance(root, ast.Name) else ""
    if name == "torch":
        return function.value is root and only_computes(function.attr)
    if name == "ops":
        return ast.unparse(function) == "ops.prim.NumToTensor"
    if name == "__torch__":  # a function or a class of this code
        return True
    return bool(_ON_MODULES(function.attr)) or only_computes(function.attr)


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node
