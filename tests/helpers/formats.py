"""Which formats can be written here, and of which networks."""

import pytest

from mobileone.export.formats.table import FORMATS, check_packages
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import fixed_images
from mobileone.quantization import quantize_trained
from tests.helpers.tiny import tiny_network, tiny_spec

__all__ = ["OF_FLOATS", "network_for", "skip_without_packages"]

OF_FLOATS = [name for name, row in FORMATS.items() if not row.integers]


def skip_without_packages(name, scheme=None):
    """Skip a test of a format whose packages are not installed, or do not exist for this Python."""
    try:
        check_packages([name], scheme=scheme)
    except ImportError as error:
        pytest.skip(str(error))


def network_for(name):
    """The tiny network, of integers where the format is."""
    if not FORMATS[name].integers:
        return tiny_network()
    return quantize_trained(tiny_network(), [normalize(fixed_images(tiny_spec()), tiny_spec())])
