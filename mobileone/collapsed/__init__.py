"""Collapsed training: exact over-parameterized training at the cost of a plain network."""

from mobileone.collapsed.branches import CollapseMode, is_hooked
from mobileone.collapsed.choices import keep_choices
from mobileone.collapsed.cost_model import Path
from mobileone.collapsed.dispatch import Plan, log_path_once, path_of, plan_collapsed, run_collapsed

__all__ = [
    "CollapseMode",
    "Path",
    "Plan",
    "is_hooked",
    "keep_choices",
    "log_path_once",
    "path_of",
    "plan_collapsed",
    "run_collapsed",
]
