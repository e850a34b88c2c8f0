"""Which formats can be written here, and of which networks."""

import pytest

from mobileone.export.formats.table import FORMATS, check_packages

__all__ = ["OF_FLOATS", "skip_without_packages"]

OF_FLOATS = [name for name, row in FORMATS.items() if not row.integers]


def skip_without_packages(name):
    """Skip a test of a format whose packages are not installed, or do not exist for this Python."""
    try:
        check_packages([name])
    except ImportError as error:
        pytest.skip(str(error))
