"""Which formats can be written here."""

import pytest

from mobileone.export.formats.table import check_packages

__all__ = ["skip_without_packages"]


def skip_without_packages(name):
    """Skip a test of a format whose packages are not installed, or do not exist for this Python."""
    try:
        check_packages([name])
    except ImportError as error:
        pytest.skip(str(error))
