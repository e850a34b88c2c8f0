"""Files that appear complete or not at all: written under another name, then renamed."""

import ctypes
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

__all__ = [
    "atomic_write",
    "clean_stale",
    "directory_lock",
    "discard",
    "flush",
    "point_link",
    "publish_file",
    "publish_folder",
    "replace_text",
    "staging",
]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` at the end: a kill at any moment leaves old or new.

    If the block raises, the new file is removed and the old one stays. The folder is made if it
    does not exist. Where a power cut matters too, `flush` the file.

    Args:
        path: The file's place.

    Returns:
        A hidden name in the same folder with the same ending, of this call alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, in place of an older one."""
    with atomic_write(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Push a file or folder to the disk, so that a power cut cannot reorder it with a rename."""
    if os.name != "posix":
        return
    with _opened(path) as descriptor:
        os.fsync(descriptor)


try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


_PREFIX = ".tmp-"
_REPLACED = ".replaced-"


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A fresh folder in `parent`, held by this process, and removed on exit whatever happens.

    What killed processes of this machine have left in `parent` is removed before: on a network
    file system the locks of other machines may not be seen.
    """
    parent.mkdir(parents=True, exist_ok=True)
    if fcntl is not None:  # without locks nobody can tell what is left from what is in use
        _clean_folders(path for path in parent.glob(f"{_PREFIX}*") if _is_of_this_machine(path))
    folder = _hidden(parent)
    with ExitStack() as held:
        while not folder.is_dir():  # another process may clean it away before it is held
            folder.mkdir()
            held.enter_context(_held(folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def directory_lock(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold `folder` for this process, also against a crash; nothing is written for it.

    Args:
        folder: made if it is not there.
        patience: seconds to wait for another process to release it.

    Raises:
        FileExistsError: another process holds it.
    """
    if fcntl is None:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder) as descriptor:
        end = time.monotonic() + patience
        while not _locked(descriptor):
            if time.monotonic() >= end:
                raise FileExistsError(
                    f"another run writes to {folder}: wait for its end, or give this one a folder "
                    "of its own"
                )
            time.sleep(0.2)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def publish_file(staged: Path, final: Path) -> None:
    """Flush `staged` and rename it to `final`, over an older file if there is one."""
    flush(staged)
    staged.replace(final)
    flush(final.parent)


def publish_folder(staged: Path, final: Path) -> None:
    """Flush the folder `staged` and rename it to `final`, replacing an older one."""
    _level_permissions(staged)
    for path in [*staged.rglob("*"), staged]:
        flush(path)
    if not os.path.lexists(final):
        staged.rename(final)
    elif _swap(staged, final):
        _remove(staged)  # now the older one
    else:
        _replace_in_two_steps(staged, final)
    flush(final.parent)


def discard(path: Path) -> None:
    """Remove a file or folder under another name, so that no half of it is ever seen."""
    if os.path.lexists(path):
        hidden = _hidden(path.parent)
        with _held(path):
            path.rename(hidden)
            _remove(hidden)


def point_link(link: Path, target: Path | None) -> None:
    """Make `link` a relative symlink to `target`; None removes it.

    Raises:
        FileExistsError: `link` is a real folder.
    """
    if target is None:
        if link.is_symlink():
            link.unlink()
        return
    if link.is_dir() and not link.is_symlink():
        raise FileExistsError(f"{link} is a folder and not a link: move it away")
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and link.readlink() == Path(relative):
        return
    fresh = _hidden(link.parent)
    fresh.symlink_to(relative)
    fresh.replace(link)


def clean_stale(parent: Path) -> None:
    """Remove what killed processes left in `parent`, which this one holds, and restore a folder
    that one was replacing. What another process has in use there stays; without locks (Windows)
    nothing is removed, because it may be in use.
    """
    _clean_folders(parent.glob(f"{_PREFIX}*"))
    for path in parent.glob(f"{_PREFIX}*") if fcntl is not None else ():
        if not path.is_dir() or path.is_symlink():
            _remove(path)


def _hidden(parent: Path, ending: str = "") -> Path:
    """A new name in `parent`, with the machine's in it."""
    return parent / f"{_PREFIX}{_machine()}-{secrets.token_hex(6)}{ending}"


def _machine() -> str:
    """The machine's name, as it can be in a file's; empty if it is not known."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:64]


def _is_of_this_machine(path: Path) -> bool:
    machine, before = _machine(), path.name.partition(_REPLACED)[0]
    return bool(machine) and before.rpartition("-")[0] == f"{_PREFIX}{machine}"


def _clean_folders(paths: Iterable[Path]) -> None:
    for path in sorted(paths):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # another user's, or just removed
                _clean_folder(path)


def _clean_folder(path: Path) -> None:
    with ExitStack() as opened:
        if fcntl is not None and not _is_left(opened.enter_context(_opened(path)), path):
            return
        original = path.name.partition(_REPLACED)[2]
        if original and not os.path.lexists(path.parent / original):
            path.rename(path.parent / original)
        elif fcntl is not None:
            _remove(path)


def _is_left(descriptor: int, path: Path) -> bool:
    """Lock an open folder; True if nobody held it, and it has not been removed and made again."""
    return _locked(descriptor) and os.path.samestat(os.fstat(descriptor), path.lstat())


def _held(path: Path) -> ExitStack:
    """A lock on a folder, which stays with it through renames; nothing where there can be none."""
    held = ExitStack()
    with suppress(OSError):  # a file, a folder that was just cleaned away, a system without locks
        held.enter_context(directory_lock(path, patience=60.0))
    return held


def _replace_in_two_steps(staged: Path, final: Path) -> None:
    """For file systems without a swap: a kill between the renames is repaired by `clean_stale`."""
    aside = _hidden(final.parent, f"{_REPLACED}{final.name}")
    with _held(final):
        final.rename(aside)
        try:
            staged.rename(final)
        except OSError:
            aside.rename(final)
            raise
        _remove(aside)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    a, b = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    try:
        if sys.platform.startswith("linux"):
            at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            return bool(libc and libc.renameat2(at_cwd, a, at_cwd, b, exchange) == 0)
        if sys.platform == "darwin":
            swap = 2  # RENAME_SWAP
            return bool(libc and libc.renamex_np(a, b, swap) == 0)
    except AttributeError:  # a C library without the call
        return False
    return False


def _level_permissions(folder: Path) -> None:
    """Give every file the umask's permissions: some writers make theirs private."""
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
