"""Hold back what converters and runtimes print, Python's lines and C++'s, and nothing else."""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

# what they print on every machine that has a current PyTorch, or is not a Mac
_LINES = re.compile(
    # coremltools
    r"scikit-learn version .* is not supported"
    r"|(Torch|TensorFlow) version .* has not been tested with coremltools"
    r"|Failed to load _ML\w+"
    r"|Tuple detected at graph output"
    r"|^(Converting PyTorch Frontend|Running MIL \w+ pipeline|Running compression pass)"
    # ExecuTorch
    r"|cpuinfo_utils\.cpp|threadpool\.cpp"
    # Core AI
    r"|coreai-torch [\d.]+: converting|ODIE"
    # LiteRT
    r"|absl::InitializeLog|oneDNN custom|arithmetic ops|Created TensorFlow Lite"
    # torchao, which several import
    r"|is an Enum subclass and is now natively supported"
)
_WARNINGS = (
    r"`torch\.jit\.\w+` is deprecated"
    r"|Function _TORCH_OPS_REGISTRY\."  # coremltools about itself, at each operation
    r"|Output, '.*', of the source model, has"
    r"|Implicitly cleaning up"  # it leaves a folder of weights to the garbage collector
    r"|(read_text|open_text|read_binary|open_binary) is deprecated"  # ExecuTorch
    r"|This API is experimental"
    r"|coreai-torch has only been validated with"
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back known lines on stdout, stderr and coremltools' logger, and known warnings.

    Other lines appear on stderr at the end. Standard error is taken from the whole process: C++
    libraries write to it by its number.
    """
    logger, printed = logging.getLogger("coremltools"), io.StringIO()

    def wanted(record: logging.LogRecord) -> bool:
        return not _LINES.search(record.getMessage())

    logger.addFilter(wanted)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as native:
        own = os.dup(2)
        os.dup2(native.fileno(), 2)
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                warnings.filterwarnings("ignore", _WARNINGS)
                yield
        finally:
            logger.removeFilter(wanted)
            os.dup2(own, 2)
            os.close(own)
            native.seek(0)
            said = printed.getvalue() + native.read().decode(errors="replace")
            for line in re.split(r"[\r\n]+", said):
                if line.strip() and not _LINES.search(line):
                    print(line, file=sys.stderr)
