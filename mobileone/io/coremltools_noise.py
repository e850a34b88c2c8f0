"""Suppress what coremltools prints on every machine, and nothing else."""

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

# What coremltools prints on every machine that has a current PyTorch, or is not a Mac.
_NOISE = re.compile(
    r"scikit-learn version .* is not supported"
    r"|Torch version .* has not been tested with coremltools"
    r"|TensorFlow version .* has not been tested with coremltools"
    r"|Failed to load _ML\w+"
    r"|Tuple detected at graph output"
    r"|register_constant\(\) on Enum subclasses"  # torchao, which it imports where it is installed
)
_PROGRESS = re.compile(
    r"(Converting PyTorch Frontend|Running MIL \w+ pipeline|Running compression pass)"
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back known noise by its text, and nothing else."""
    logger = logging.getLogger("coremltools")

    def wanted(record: logging.LogRecord) -> bool:
        return not _NOISE.search(record.getMessage())

    captured = io.StringIO()
    logger.addFilter(wanted)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(captured):
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
            # coremltools about itself, at each operation of an exported program
            warnings.filterwarnings("ignore", message=r"Function _TORCH_OPS_REGISTRY\.")
            warnings.filterwarnings("ignore", message=r"Output, '.*', of the source model, has")
            # coremltools leaves a temporary folder of weights to the garbage collector
            warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
            yield
    finally:
        logger.removeFilter(wanted)
        for line in re.split(r"[\r\n]+", captured.getvalue()):
            if line.strip() and not (_PROGRESS.match(line) or _NOISE.search(line)):
                print(line, file=sys.stderr)
