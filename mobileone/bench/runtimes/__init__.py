"""Runtimes that a fused network can be timed in: one file a runtime, one row in the table."""

from mobileone.bench.runtimes.table import (
    RUNTIMES,
    Runtime,
    check_runtimes,
    missing_runtimes,
    runtimes_for,
    shipped,
)

__all__ = ["RUNTIMES", "Runtime", "check_runtimes", "missing_runtimes", "runtimes_for", "shipped"]
