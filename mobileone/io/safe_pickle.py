"""Files of tensors: whether one that torch refused is damaged, or would have run code."""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["UnsafeFileError", "explain_refusal", "foreign_globals"]

_NAMED = re.compile(r"(?:GLOBAL|class|type) '?([A-Za-z_]\w*(?:\.\w+)+)")
# what pickles of tensors name; anything else is an object, and its making is a call
_OF_TENSORS = re.compile(
    r"torch\.(\w*Storage|\w+\d+|_utils\._rebuild_\w+|Size|Tensor|device|nn\.parameter\.Parameter)"
    r"|collections\.OrderedDict|_codecs\.encode"
)
_FIX = (
    "Give a file of tensors and primitives: a state dict, .safetensors, or a checkpoint of "
    "`mobileone fit`; if you made this one, save its state_dict() alone"
)
_READ = 1 << 26
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING")


class UnsafeFileError(ValueError):
    """Loading the file would call functions that it names, so it was not loaded."""


def explain_refusal(
    source: Path | bytes, name: str, error: Exception, fix: str = _FIX
) -> ValueError:
    """The error to raise where ``torch.load(…, weights_only=True)`` has raised ``error``.

    torch's own text advises to take the protection off, which no option here does.

    Args:
        source: the file, or its contents.
        name: of the file, for the message.
        error: what torch raised.
        fix: what to do about a file that names functions.

    Returns:
        `UnsafeFileError` if the file names functions or classes, else a `ValueError` that calls it
        damaged.
    """
    found = _NAMED.search(str(error))
    names = [found[1]] if found else list(foreign_globals(source))
    if names:
        culprit = names[0].replace("__builtin__.", "builtins.")  # as old pickles call it
        return UnsafeFileError(
            f"{name} names {culprit!r}, and loading it would run code: refused. {fix}"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    reason = "" if "weights_only" in first else f" ({first})"
    return ValueError(
        f"{name} cannot be read as tensors: it is damaged, cut short, or another kind of file"
        f"{reason}. Copy it again, or give another file"
    )


def foreign_globals(source: Path | bytes) -> Iterator[str]:
    """Functions and classes beyond tensors that the pickles of a file name; none are imported."""
    for stream in _pickles(source):
        yield from (name for name in _globals(stream) if not _OF_TENSORS.fullmatch(name))


def _pickles(source: Path | bytes) -> Iterator[bytes]:
    """The pickles in a zip archive; else the file itself, or the beginning of a large one."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        yield archive.read(name)
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError):
            file.seek(0)
            yield file.read(_READ)


def _globals(stream: bytes) -> Iterator[str]:
    """What the pickles that follow each other in `stream` name."""
    texts: list[str] = []
    rest = io.BytesIO(stream)
    try:
        while rest.tell() < len(stream):
            for operation, argument, _ in pickletools.genops(rest):
                if operation.name in _STRINGS:
                    texts.append(str(argument))
                elif operation.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif operation.name == "STACK_GLOBAL" and len(texts) > 1:
                    yield f"{texts[-2]}.{texts[-1]}"
    except Exception:  # no pickle, or a damaged one: what it named until there is known
        return
