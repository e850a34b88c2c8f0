"""The processors that a measurement may use, held fixed while it lasts."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["check_threads", "pinned", "torch_threads"]

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def check_threads(threads: int) -> None:
    """Make sure that this process may use so many processors.

    Raises:
        ValueError: It may not.
    """
    usable = _usable()
    if not 1 <= threads <= usable:
        raise ValueError(
            f"`threads` (={threads}) must be from 1 to {usable}, the processors of this process: "
            "with more, threads wait for each other"
        )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's number of threads within an operation; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Keep all threads of this process on fixed processors, and the garbage collector off.

    Where the system says which logical processors share a core, one of each core is taken
    first. The processors cannot be fixed outside Linux; there the list is empty.

    Args:
        threads: How many processors.

    Returns:
        The processors.
    """
    chosen = _spread()[:threads] if hasattr(os, "sched_setaffinity") else []
    before = {}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # pools of threads exist already, and each thread has its own affinity
        for task in _tasks() if chosen else []:
            before[task] = os.sched_getaffinity(task)
            os.sched_setaffinity(task, chosen)
        yield chosen
    finally:
        for task, processors in before.items():
            try:
                os.sched_setaffinity(task, processors)
            except ProcessLookupError:  # the thread has ended
                continue
        if collecting:
            gc.enable()


def _usable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tasks() -> list[int]:
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _spread() -> list[int]:
    """The usable logical processors, those of different cores first."""
    firsts: list[int] = []
    others: list[int] = []
    seen = set()
    for processor in sorted(os.sched_getaffinity(0)):
        topology = Path(_TOPOLOGY.format(processor))
        core = topology.read_text().strip() if topology.exists() else str(processor)
        (others if core in seen else firsts).append(processor)
        seen.add(core)
    return firsts + others
