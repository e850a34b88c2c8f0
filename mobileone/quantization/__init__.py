"""Networks of integers: training against them, folding that knows of rounding, what ships."""

from mobileone.quantization.layer import Statistics
from mobileone.quantization.network import (
    calibrate_quantization,
    conditions,
    quantize,
    quantize_trained,
    scheme_of,
)
from mobileone.quantization.rounding import SCHEMES, Scales, Scheme

__all__ = [
    "SCHEMES",
    "Scales",
    "Scheme",
    "Statistics",
    "calibrate_quantization",
    "conditions",
    "quantize",
    "quantize_trained",
    "scheme_of",
]
