"""Suppress what coremltools prints on every machine, and nothing else."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mobileone.io.noise import EXECUTORCH_WARNINGS, TORCHAO_LINES, without_noise

__all__ = ["quiet"]

# What coremltools prints on every machine that has a current PyTorch, or is not a Mac.
_NOISE = re.compile(
    r"scikit-learn version .* is not supported"
    r"|Torch version .* has not been tested with coremltools"
    r"|TensorFlow version .* has not been tested with coremltools"
    r"|Failed to load _ML\w+"
    r"|Tuple detected at graph output"
)
_PROGRESS = r"^(Converting PyTorch Frontend|Running MIL \w+ pipeline|Running compression pass)"
_WARNINGS = "|".join(
    [
        r"`torch\.jit\.\w+` is deprecated",
        r"Function _TORCH_OPS_REGISTRY\.",  # coremltools about itself, at each operation
        r"Output, '.*', of the source model, has",
        "Implicitly cleaning up",  # it leaves a folder of weights to the garbage collector
        EXECUTORCH_WARNINGS,  # which it imports where it is installed
    ]
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back known noise by its text, and nothing else."""
    logger = logging.getLogger("coremltools")

    def wanted(record: logging.LogRecord) -> bool:
        return not _NOISE.search(record.getMessage())

    logger.addFilter(wanted)
    try:
        with without_noise(f"{_NOISE.pattern}|{_PROGRESS}|{TORCHAO_LINES}", _WARNINGS):
            yield
    finally:
        logger.removeFilter(wanted)
