"""How inferences are timed: order, statistic, and the processors that they are kept on."""

import os
import random
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Run",
    "check_device",
    "check_threads",
    "get_protocol",
    "pinned",
    "summarize",
    "time_in_turn",
    "torch_threads",
]

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def check_threads(threads: int) -> None:
    """Make sure that this process may use that many processors.

    Raises:
        ValueError: It may not.
    """
    usable = _usable()
    if not 1 <= threads <= usable:
        raise ValueError(
            f"`threads` (={threads}) must be from 1 to {usable}, the processors of this process: "
            "with more, threads wait for each other"
        )


def check_device(device: str) -> None:
    """Make sure that PyTorch has a device.

    Raises:
        ValueError: It has not; names those that there are.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: not compiled with CUDA
        there = [d for d in ("cuda", "mps", "xpu") if torch.get_device_module(d).is_available()]
        raise ValueError(
            f"`device` (={device!r}) is not on this machine; there is {', '.join(['cpu', *there])}"
        ) from error


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
    """Keep all threads of this process on fixed processors.

    Where the system reports which logical processors share a core, one of each core is taken
    first. The processors cannot be fixed outside Linux; there the list is empty.

    Args:
        threads: How many processors.

    Returns:
        The processors.
    """
    chosen = _spread()[:threads] if hasattr(os, "sched_setaffinity") else []
    before = {}
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


Run = Callable[[], Any]
"""One inference on an input that exists already; returns when the output exists."""


@dataclass(frozen=True)
class Protocol:
    """A way to time.

    Attributes:
        name: Its name.
        runs: Timed inferences of each case, in all rounds together.
        rounds: Turns that each case gets; its inferences within a turn follow each other.
        warmup: Untimed inferences at the beginning of each turn.
        reload: Whether the model is reloaded before each turn.
        trim: How many of the shortest and of the longest times of each turn are dropped.
        statistic: The number to quote, a column of the rows.
    """

    name: str
    runs: int
    rounds: int
    warmup: int
    reload: bool
    trim: int
    statistic: str

    def turns(self) -> list[int]:
        """Timed inferences of each round."""
        share, rest = divmod(self.runs, self.rounds)
        return [share + (i < rest) for i in range(self.rounds)]


PROTOCOLS = {
    # Section 3 of the paper: 1 warm-up, 1000 runs, the minimum. The runs come in turns, so that
    # cases can alternate; the untimed inference of each turn brings the weights back into
    # the caches, where an uninterrupted series would have them.
    "paper": Protocol("paper", 1000, 20, 1, reload=False, trim=0, statistic="min_ms"),
    # ModelBench, the app of the paper's code: 20 rounds of 50, reloaded, 1 warm-up, without
    # the 10 lowest and highest of each round; low, average, high.
    "modelbench": Protocol("modelbench", 1000, 20, 1, reload=True, trim=10, statistic="mean_ms"),
}


def get_protocol(name: str, runs: int | None = None) -> Protocol:
    """A protocol, with another number of runs if given.

    Raises:
        ValueError: It is unknown, or there are too few runs for it.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` (={name!r}) must be one of {', '.join(PROTOCOLS)}")
    chosen = PROTOCOLS[name]
    if runs is None:
        return chosen
    least = chosen.rounds * (2 * chosen.trim + 1) if chosen.trim else 1
    if runs < least:
        raise ValueError(f"`runs` (={runs}) must be at least {least} for the protocol {name!r}")
    return replace(chosen, runs=runs, rounds=min(chosen.rounds, runs))


def time_in_turn(
    loaders: Mapping[str, Callable[[], Run]], protocol: Protocol
) -> dict[str, list[float]]:
    """Time cases in alternation, so that other load of the machine affects all.

    Loading, compiling and warm-up are outside the times. The order within a round is shuffled,
    the same each time, so that no case always follows the same other one.

    Args:
        loaders: What makes each case ready to run.
        protocol: How.

    Returns:
        Times in seconds that the protocol keeps, by case.
    """
    times: dict[str, list[float]] = {name: [] for name in loaders}
    order = list(loaders)
    shuffle = random.Random(0).shuffle
    ready = {} if protocol.reload else {name: load() for name, load in loaders.items()}
    for count in protocol.turns():
        shuffle(order)
        for name in order:
            run = loaders[name]() if protocol.reload else ready[name]
            for _ in range(protocol.warmup):
                run()
            # with the garbage collector off
            found = timeit.repeat(run, timer=time.perf_counter_ns, repeat=count, number=1)
            kept = sorted(nanoseconds / 1e9 for nanoseconds in found)
            times[name] += kept[protocol.trim : len(kept) - protocol.trim]
    return times


def summarize(times: list[float]) -> dict[str, float | int]:
    """Statistics in milliseconds: `min_ms`, `median_ms`, `p90_ms`, `mean_ms`, `max_ms`, `timed`."""
    milliseconds = 1e3 * np.asarray(times)
    return {
        "min_ms": float(milliseconds.min()),
        "median_ms": float(np.median(milliseconds)),
        "p90_ms": float(np.percentile(milliseconds, 90)),
        "mean_ms": float(milliseconds.mean()),
        "max_ms": float(milliseconds.max()),
        "timed": len(times),
    }
