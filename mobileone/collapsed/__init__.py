"""Collapsed training: exact over-parameterized training at the cost of a plain network."""

from mobileone.collapsed.branches import CollapseMode, is_hooked
from mobileone.collapsed.cost_model import Path
from mobileone.collapsed.dispatch import log_path_once, path_of, plan_collapsed, run_collapsed

__all__ = [
    "CollapseMode",
    "Path",
    "is_hooked",
    "log_path_once",
    "path_of",
    "plan_collapsed",
    "run_collapsed",
]
