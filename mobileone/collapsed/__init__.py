"""Collapsed training: exact over-parameterised training at the price of a plain network."""

from mobileone.collapsed.branches import is_hooked
from mobileone.collapsed.cost_model import CollapseMode, Path
from mobileone.collapsed.dispatch import path_of, plan_collapsed, run_collapsed, set_collapse

__all__ = [
    "CollapseMode",
    "Path",
    "is_hooked",
    "path_of",
    "plan_collapsed",
    "run_collapsed",
    "set_collapse",
]
