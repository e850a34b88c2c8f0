"""How waiting threads wait: awake where the cores are ours, asleep where they are shared."""

import os
import sys

import pytest

from lightning_modules.cli import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """What is chosen on two cores with a load, a quota, and settings of the user's."""

    def choose(load, busy=0.0, quota="max", own=None):
        environment = {k: v for k, v in os.environ.items() if k not in threads._OWN} | (own or {})
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
        for name, text in (("_QUOTA", f"{quota} 100000"), ("_STAT", "")):
            (tmp_path / name).write_text(text)
            monkeypatch.setattr(threads, name, tmp_path / name)
        ticks = int(1000 * os.sysconf("SC_CLK_TCK") * threads._LOOK)  # a look at 1000 idle cores

        def look(_):
            worked = int(ticks * busy / 1000)
            (tmp_path / "_STAT").write_text(f"cpu 7 {worked} 0 {ticks} 0 0 0 0 0 0\ncpu0 1")

        (tmp_path / "_STAT").write_text("cpu 7 0 0 0 0 0 0 0 0 0\ncpu0 1")
        monkeypatch.setattr(threads.time, "sleep", look)
        modules = {name: module for name, module in sys.modules.items() if name != "torch"}
        with monkeypatch.context() as before_torch:
            before_torch.setattr(sys, "modules", modules)
            said = threads.choose_waiting()
        return {name: environment[name] for name in threads._OWN if name in environment}, said

    return choose


@pytest.mark.parametrize("load, busy", [(0.1, 0.0), (3.0, 0.1)], ids=["idle", "idle by now"])
def test_threads_wait_awake_on_idle_cores(machine, load, busy):
    chosen, said = machine(load, busy)
    assert chosen == {"GOMP_SPINCOUNT": threads._SPINS}
    assert "awake" in said


@pytest.mark.parametrize(
    "situation, why",
    [
        ({"load": 1.2, "busy": 1.0}, "1.0 of 2 cores"),
        ({"load": 0.0, "quota": "150000"}, "1.5 of 2"),
    ],
    ids=["shared", "quota"],
)
def test_threads_sleep_on_shared_cores(machine, situation, why):
    chosen, said = machine(**situation)
    assert chosen == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert "sleep" in said and why in said


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
@pytest.mark.parametrize("load", [0.0, 2.0])
def test_who_sets_a_variable_has_chosen(machine, own, load):
    assert machine(load, load, own=own) == (own, "")


def test_nothing_is_chosen_or_said_once_torch_is_loaded(monkeypatch):
    for name in threads._OWN:
        monkeypatch.delenv(name, raising=False)
    assert threads.choose_waiting() == ""
    assert not set(threads._OWN) & set(os.environ)
