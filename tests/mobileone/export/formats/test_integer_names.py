"""Errors for integer formats name what can be done."""

import pytest

from mobileone.export.formats.table import check_formats, check_integers


def test_there_is_no_integer_core_ai_file_yet():
    with pytest.raises(ValueError, match=r"coreai-torch 0\.4\.3 refuses"):
        check_formats(["coreai_int8"])


def test_a_float_network_is_sent_to_training_and_to_rounding():
    with pytest.raises(ValueError, match=r"configs/quantize\.yaml.*`mobileone compress`"):
        check_integers(["onnx_int8"], quantized=False)
