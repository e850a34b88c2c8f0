"""Memory that tensors gave back is kept for the next ones."""

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have this process keep the memory of freed tensors: for training on a CPU.

    glibc returns large blocks to the system, which clears them again, page by page, when the next
    tensor takes them: a fifth of a training step. The most memory that a process takes is not more.

    Returns:
        Whether it was set: not where the C library is another, or the environment has settings.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and library.mallopt(_MMAP_MAX, 0))
