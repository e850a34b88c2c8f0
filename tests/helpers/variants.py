"""Test cases of which some run with `-m slow` only."""

import pytest

__all__ = ["middle_is_slow", "slow", "slow_where"]

MIDDLE = ("mobileone_s1", "mobileone_s2", "mobileone_s3")


def slow(*case):
    """A case of `parametrize` that runs with `-m slow`; its values are the arguments."""
    return pytest.param(*case, marks=pytest.mark.slow)


def slow_where(condition, names):
    """The names as cases; those for which the condition holds run with `-m slow`."""
    return [slow(name) if condition(name) else name for name in names]


def middle_is_slow(names):
    """The names as cases; S1 to S3, which have no layer that S0 or S4 has not, with `-m slow`."""
    return slow_where(MIDDLE.__contains__, names)
