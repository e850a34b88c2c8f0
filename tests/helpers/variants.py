"""Models as test cases."""

import pytest

MIDDLE = ("mobileone_s1", "mobileone_s2", "mobileone_s3")


def middle_is_slow(names):
    """The names as cases; S1 to S3, which have no layer that S0 or S4 has not, with `-m slow`."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in MIDDLE else n for n in names]
