"""The timer times inferences, all of them in turn, and nothing else."""

import os
import sys

import pytest
import torch

from mobileone.bench import timing
from mobileone.bench.timing import (
    Protocol,
    check_threads,
    get_protocol,
    pinned,
    summarize,
    time_in_turn,
    torch_threads,
)


class Clock:
    """A clock that only the cases move, and what they did."""

    def __init__(self, monkeypatch):
        self.now = 0
        self.calls = []
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now)

    def case(self, name, durations):
        """A loader that takes 1000 ms; its runs take `durations` ms in turn, the last forever."""

        def load():
            self.now += 1_000_000_000
            self.calls.append(f"load {name}")
            left = list(durations)

            def run():
                self.now += 1_000_000 * (left.pop(0) if len(left) > 1 else left[0])
                self.calls.append(name)

            return run

        return load


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_loading_and_warm_up_are_not_timed(clock):
    loaders = {"a": clock.case("a", [500, 3, 2]), "b": clock.case("b", [700, 5])}
    times = time_in_turn(loaders, Protocol("x", 6, 1, 1, reload=False, trim=0, statistic="min_ms"))
    assert times["a"] == [0.002] * 5 + [0.003]
    assert times["b"] == [0.005] * 6


def test_cases_alternate_in_changing_order(clock):
    names = ["a", "b", "c"]
    protocol = Protocol("x", 40, 20, 1, reload=False, trim=0, statistic="min_ms")
    time_in_turn({name: clock.case(name, [1]) for name in names}, protocol)
    assert clock.calls[:3] == ["load a", "load b", "load c"]
    runs = clock.calls[3:]
    rounds = [runs[i : i + 9] for i in range(0, len(runs), 9)]
    assert len(rounds) == 20
    for each in rounds:  # a warm-up and two timed inferences of every one, back to back
        assert sorted(each) == sorted(names * 3)
        assert each[0] == each[1] == each[2] and each[3] == each[4] == each[5]
    assert len({each[0] for each in rounds}) == 3


def test_modelbench_loads_each_turn_anew_and_trims_each_turn(clock):
    # in each turn of 5, after the warm-up: 9 1 2 3 8 -> 2 3 8 without the extremes
    loaders = {"a": clock.case("a", [99, 9, 1, 2, 3, 8])}
    times = time_in_turn(loaders, Protocol("x", 10, 2, 1, reload=True, trim=1, statistic="mean_ms"))
    assert clock.calls.count("load a") == 2
    assert sorted(times["a"]) == [0.002, 0.002, 0.003, 0.003, 0.008, 0.008]


def test_the_protocols_are_those_of_their_sources():
    paper, bench = get_protocol("paper"), get_protocol("modelbench")
    assert (paper.runs, paper.warmup, paper.statistic, paper.trim) == (1000, 1, "min_ms", 0)
    assert (bench.rounds, bench.turns(), bench.trim) == (20, [50] * 20, 10)
    assert bench.reload and bench.warmup == 1 and bench.statistic == "mean_ms"
    assert get_protocol("paper", 7).turns() == [1] * 7
    assert get_protocol("paper", 45).turns() == [3] * 5 + [2] * 15
    with pytest.raises(ValueError, match=r"'fast'.*paper, modelbench"):
        get_protocol("fast")
    with pytest.raises(ValueError, match=r"`runs` \(=400\) must be at least 420"):
        get_protocol("modelbench", 400)
    with pytest.raises(ValueError, match=r"`runs` \(=0\)"):
        get_protocol("paper", 0)


def test_statistics():
    summary = summarize([0.001 * n for n in range(1, 12)])
    assert summary == pytest.approx(
        {"min_ms": 1, "median_ms": 6, "p90_ms": 10, "mean_ms": 6, "max_ms": 11, "timed": 11}
    )


def test_threads_and_processors_are_held_and_restored():
    before = torch.get_num_threads()
    with torch_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), pinned(1) as processors:
        if sys.platform == "linux":
            assert os.sched_getaffinity(0) == set(processors) and len(processors) == 1
        1 / 0  # noqa: B018
    if sys.platform == "linux":
        assert len(os.sched_getaffinity(0)) == check_threads.__globals__["_usable"]()
    with pytest.raises(ValueError, match=r"`threads` \(=100000\) must be from 1"):
        check_threads(100_000)
