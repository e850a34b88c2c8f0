"""The CPU kernels as a library: compiled once a machine with its own compiler, and cached.

The build takes a few seconds, happens at the first training step, and stays in
`$XDG_CACHE_HOME/mobileone` (default `~/.cache/mobileone`), or, where nothing can be written there
or others could, in a folder of this user's among the temporary files.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mobileone.io.atomic import flush

__all__ = ["cache_folders", "load", "private"]

log = logging.getLogger(__name__)

_SOURCES = ("algebra.cpp", "depthwise.cpp", "gram.cpp", "pointwise.cpp")
_HEADERS = ("branches.h", "input_gradient.h", "moments.h", "patches.h", "planes.h", "tiles.h")
# sums may be reordered to use vectors; NaN and infinity keep their meaning
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)


def load() -> ctypes.CDLL | None:
    """Load the library, building it if it is missing; None, and a warning, where that fails."""
    named = (os.environ.get("CXX", ""), "g++", "c++")
    compiler = next(filter(None, map(shutil.which, named)), None)
    failure: Exception | str = "no C++ compiler"
    if compiler is not None:
        try:
            digest = _digest(compiler)
            for folder in cache_folders():
                try:
                    return ctypes.CDLL(str(_built(compiler, digest, private(folder))))
                except (OSError, subprocess.SubprocessError) as error:  # read-only, noexec, full
                    failure = error
        except (OSError, subprocess.SubprocessError) as error:
            failure = error
    log.warning("collapsed training goes without its CPU kernels, slower: %s", failure)
    return None


def cache_folders() -> Iterator[Path]:
    """Where the library may be kept, the best place first."""
    with suppress(RuntimeError):  # a user without an entry in passwd has no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mobileone"
    if hasattr(os, "getuid"):
        yield Path(tempfile.gettempdir()) / f"mobileone-{os.getuid()}"


def private(folder: Path) -> Path:
    """Make a folder in which nobody else can plant a library, or make sure that it is one.

    Whoever can write to a folder above could put another in its place.

    Raises:
        PermissionError: It is somebody else's, or others can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        place = folder.resolve()
        for path in (place, *place.parents):
            found = path.stat()
            ours = found.st_uid == os.getuid() or (path != place and found.st_uid == 0)
            shared = found.st_mode & 0o022 and (path == place or not found.st_mode & stat.S_ISVTX)
            if not ours or shared:
                raise PermissionError(f"{path} is open to others")
    return folder


def _digest(compiler: str) -> str:
    """Of all that decides what the compiler makes."""
    # the compiler's own macros name its version and what this processor can do
    probe = (compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    macros = subprocess.run(probe, check=True, capture_output=True, timeout=60).stdout
    texts = [Path(__file__).with_name(name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    return _hash(b"\0".join([macros, " ".join(_FLAGS).encode(), *texts]))


def _built(compiler: str, digest: str, folder: Path) -> Path:
    """The library in a folder, built if it is not there.

    Its name ends with the hash of what it holds: a file cut short would kill the process that maps
    it, and is built again instead.
    """
    for known in sorted(folder.glob(f"collapsed-{digest}-*.so")):
        # a named pipe would be waited for
        if known.is_file() and known.stem.endswith(_hash(known.read_bytes())):
            return known
    with tempfile.TemporaryDirectory(dir=folder) as work:
        fresh = Path(work) / "collapsed.so"
        sources = [str(Path(__file__).with_name(name)) for name in _SOURCES]
        command = [compiler, *_FLAGS, *sources, "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        flush(fresh)
        built = folder / f"collapsed-{digest}-{_hash(fresh.read_bytes())}.so"
        return fresh.replace(built)  # complete, also when several processes build at once


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
