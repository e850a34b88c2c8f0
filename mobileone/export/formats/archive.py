"""Archives of PyTorch (`.pt`, `.pt2`) as records, and which operators their code may call."""

import io
import re
from functools import cache
from pathlib import Path

import torch

__all__ = ["extra_text", "fresh_archive", "only_computes", "read_records"]

# these take no text, or only the name of a mode or an equation
_WITH_TEXT = frozenset(
    "Float Int add conv1d conv2d conv3d device div div_ einsum eq ge gelu gelu_ gt index le len "
    "linalg_norm lt meshgrid ne pad scatter scatter_reduce slice split".split()
)
# in older torch (2.10) dimensions can have names
_DIMENSION = re.compile(r"(start_|end_|out_?)?dims?|dim[012]|names").fullmatch
_BEYOND = ("str", "Storage", "Stream", "Generator", "Future", "RRef", "__torch__")


def read_records(path: Path, kind: str) -> dict[str, bytes]:
    """The contents of an archive by name.

    Args:
        path: the file.
        kind: what it should be, for the error.

    Raises:
        ValueError: it is damaged, or no such file.
    """
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(path.read_bytes()))
        return {name: reader.get_record(name) for name in reader.get_all_records()}
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, or not a {kind} file ({first})") from error


def extra_text(path: Path, name: str, kind: str) -> str:
    """A text that was saved next to what the archive holds; empty where there is none.

    Args:
        path: the file.
        name: of the text.
        kind: see `read_records`.
    """
    return read_records(path, kind).get(f"extra/{name}", b"").decode()


def fresh_archive(records: dict[str, bytes], version: int | None = None) -> io.BytesIO:
    """A new archive: Python's and torch's readers may find different contents in a forged one.

    Args:
        records: contents by name.
        version: of the operators that the code was written for.
    """
    contents = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(contents)
    if version is not None:
        writer.set_min_version(version)
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    contents.seek(0)
    return contents


@cache
def only_computes(name: str) -> bool:
    """Whether an operator of `aten` gets and returns nothing but tensors, numbers and modes.

    Files are named by text, and everything else outside of a network is an object: what has
    arguments of neither kind cannot reach it.
    """
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    found = [argument for schema in schemas for argument in schema.arguments]
    texts = ("str", "List[str]", "Optional[List[str]]")
    types = {str(a.type) for a in found if str(a.type) not in texts or not _DIMENSION(a.name)}
    beyond = {kind.removesuffix("[]") for kind in types if kind.startswith(_BEYOND)}
    beyond -= {"str?", "Generator?"}  # modes, and None in a file
    return bool(schemas) and (not beyond or (beyond == {"str"} and name in _WITH_TEXT))
