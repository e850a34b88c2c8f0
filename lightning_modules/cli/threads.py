"""How PyTorch's threads wait for each other: asleep where cores are shared, else awake a moment."""

import os
import sys
import time
from pathlib import Path

__all__ = ["choose_waiting"]

_SPINS = "1000"
"""Looks at a barrier before a thread sleeps: as long as most gaps in a step. A step of S0 (64 px,
32 images, two cores) takes 0.255 s with threads that sleep, 0.161 so, 0.147 with 3000; where
another process takes a core later on, 0.252, 0.354 and 0.507."""

_SHARED = 0.5
"""Cores at work for others from which threads sleep: who spins has used up its share of a core when
there is work, and all others wait for it."""

_LOOK = 0.2
"""Seconds to look whether the load of the last minute is still there."""

_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_QUOTA, _STAT = Path("/sys/fs/cgroup/cpu.max"), Path("/proc/stat")


def choose_waiting() -> str:
    """Set in the environment how threads of OpenMP wait; before torch is loaded.

    Returns:
        What was chosen and why, for people; empty where the environment has it already, or torch is
        loaded, which has read it.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _OWN):
        return ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, busy = _cores_allowed(), _cores_busy()
    if quota is not None and quota < (cores or 1):
        why = f"{quota:g} of {cores} cores are allowed here"
    elif busy >= _SHARED:
        why = f"{busy:.1f} of {cores} cores were at work for others"
    else:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
        return f"threads wait awake, as the {cores} cores are idle; OMP_WAIT_POLICY=PASSIVE if not"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return f"threads sleep when they wait, as {why}; GOMP_SPINCOUNT={_SPINS} is faster on idle ones"


def _cores_allowed() -> float | None:
    """The CPU quota of this container in cores; None where there is none."""
    try:
        quota, period = _QUOTA.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # another system, or `max`
        return None


def _cores_busy() -> float:
    """Cores at work: the load of the last minute, or of this moment if that is less."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < _SHARED:
        return load
    try:
        before = _ticks()
        time.sleep(_LOOK)
        return min(load, (_ticks() - before) / os.sysconf("SC_CLK_TCK") / _LOOK)
    except (OSError, ValueError):
        return load


def _ticks() -> int:
    """Time that all processors have worked since the start, in clock ticks."""
    user, nice, system, _idle, _wait, *rest = map(int, _STAT.read_text().split()[1:9])
    return user + nice + system + sum(rest)
