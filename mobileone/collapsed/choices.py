"""Forms that were measured, kept: in memory, in a file of this user's, and in a run's own."""

import functools
import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mobileone.collapsed import cpu_kernels
from mobileone.collapsed.cpu_build import cache_folders, private
from mobileone.io.atomic import replace_text
from mobileone.io.processor import processor

__all__ = ["keep", "keep_choices", "kept"]

log = logging.getLogger(__name__)

_FORMAT = "mobileone-forms-1"

Forms = dict[str, dict[str, str]]
"""Names of forms, by the machine and by what was measured."""

_memory: Forms | None = None  # None: not read yet
_in_run: Forms = {}
_run_file: Path | None = None


def keep_choices(folder: Path | None, rank: int = 0) -> None:
    """Take measured forms from a run's folder first, and keep there what the run uses.

    So a resumed run trains in the forms in which it began, whatever the cache holds by then. Every
    process has a file of its own: forms agree up to rounding, so that processes may differ.

    Args:
        folder: A file in it is named after the rank; None: follow no run any more.
        rank: Of this process. Where it has no file yet, that of rank 0 is read.
    """
    global _memory, _in_run, _run_file
    _memory, _in_run, _run_file = None, {}, None
    if folder is not None:
        _run_file = folder / f"rank-{rank}.json"
        _in_run = _read(_run_file) or _read(folder / "rank-0.json")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kept(device: torch.device, key: str) -> str | None:
    """The name of the form that was measured to be fastest; None: it was not measured here."""
    machine = _machine(device)
    name = _in_run.get(machine, {}).get(key)
    if name is None:
        name = _recall().get(machine, {}).get(key)
        if name is not None:
            _keep_in_run(machine, key, name)
    return name


def keep(device: torch.device, key: str, name: str, for_others: bool = True) -> None:
    """Keep what was measured.

    Args:
        device: Where.
        key: What.
        name: Of the fastest form.
        for_others: Also for processes to come; not where memory was short, for example.
    """
    machine = _machine(device)
    _recall().setdefault(machine, {})[key] = name
    _keep_in_run(machine, key, name)
    cache = _cache_file()
    if for_others and cache is not None:
        forms = _read(cache)  # which another process may have changed
        forms.setdefault(machine, {})[key] = name
        _write(cache, forms)


def _recall() -> Forms:
    global _memory
    if _memory is None:
        cache = _cache_file()
        _memory = {} if cache is None else _read(cache)
    return _memory


def _keep_in_run(machine: str, key: str, name: str) -> None:
    if _run_file is not None:
        _in_run.setdefault(machine, {})[key] = name
        _write(_run_file, _in_run)


def _cache_file() -> Path | None:
    for folder in cache_folders():
        with suppress(OSError):
            return private(folder) / "forms.json"
    return None


def _read(file: Path) -> Forms:
    """What a file holds; nothing where it is missing, damaged or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            return {}
        return {
            machine: {key: name for key, name in forms.items() if isinstance(name, str)}
            for machine, forms in content.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _write(file: Path, forms: Forms) -> None:
    try:
        replace_text(file, json.dumps({"format": _FORMAT} | forms, indent=1))
    except OSError as error:
        log.info("measured forms are not kept in %s: %s", file, error)


def _machine(device: torch.device) -> str:
    """All that decides which form is the fastest, besides the block and its input."""
    cudnn: Any = torch.backends.cudnn  # whose `conv` is typed nowhere
    if device.type == "cuda":
        flags = (cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision)
        return f"{_gpu(device)}, {flags}, {_software()}"
    kernels = "kernels" if cpu_kernels.available() else "no kernels"
    return f"{processor()}, {torch.get_num_threads()} threads, {kernels}, {_software()}"


@functools.cache
def _gpu(device: torch.device) -> str:
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(device)}, {versions}"


@functools.cache
def _software() -> str:
    """The version of torch, and of the forms: a hash of their sources."""
    sources = sorted(
        p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".cpp", ".h")
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return f"torch {torch.__version__}, forms {digest}"
