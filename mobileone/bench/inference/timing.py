"""How often, in which order, and by which statistic inferences are timed."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["PROTOCOLS", "Protocol", "Run", "get_protocol", "summarize", "time_in_turn"]

Run = Callable[[], Any]
"""One inference on an input that exists already; returns when the output exists."""

_ROUNDS = 20


@dataclass(frozen=True)
class Protocol:
    """A way to time.

    Attributes:
        name: Its name.
        runs: Timed inferences of each contender, in all rounds together.
        rounds: Turns that each contender gets; its inferences within a turn follow each other.
        warmup: Untimed inferences at the beginning of each turn.
        reload: Whether the model is loaded anew before each turn.
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

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a result."""
        return asdict(self)

    def turns(self) -> list[int]:
        """Timed inferences of each round."""
        share, rest = divmod(self.runs, self.rounds)
        return [share + (i < rest) for i in range(self.rounds)]


PROTOCOLS = {
    # Section 3 of the paper: 1 warm-up, 1000 runs, the minimum. The runs come in turns, so that
    # contenders can alternate; the untimed inference of each turn brings the weights back into
    # the caches, where an uninterrupted series would have them.
    "paper": Protocol("paper", 1000, _ROUNDS, 1, reload=False, trim=0, statistic="min_ms"),
    # ModelBench, the app of the paper's code: 20 rounds of 50, loaded anew, 1 warm-up, without
    # the 10 lowest and highest of each round; low, average, high.
    "modelbench": Protocol(
        "modelbench", 1000, _ROUNDS, 1, reload=True, trim=10, statistic="mean_ms"
    ),
}


def get_protocol(name: str, runs: int | None = None) -> Protocol:
    """A protocol, with a number of runs of one's own.

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
    fields = chosen.to_dict() | {"runs": runs, "rounds": min(chosen.rounds, runs)}
    return Protocol(**fields)


def time_in_turn(
    loaders: Mapping[str, Callable[[], Run]], protocol: Protocol
) -> dict[str, list[float]]:
    """Time contenders in alternation, so that what else the machine does meets them all.

    Loading, compiling and warm-up are outside the times. The order within a round is shuffled,
    the same each time, lest one contender always follow another.

    Args:
        loaders: What makes each contender ready to run.
        protocol: How.

    Returns:
        Times in seconds that the protocol keeps, by contender.
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
            kept = sorted(_time(run, count))
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


def _time(run: Run, count: int) -> list[float]:
    clock = time.perf_counter_ns
    times = [0] * count
    for i in range(count):
        started = clock()
        run()
        times[i] = clock() - started
    return [nanoseconds / 1e9 for nanoseconds in times]
