"""Hold back what converters and runtimes print, Python's lines and C++'s, and nothing else."""

import contextlib
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXECUTORCH_WARNINGS", "TORCHAO_LINES", "without_noise"]

# what packages say that several converters import
EXECUTORCH_WARNINGS = "(read_text|open_text|read_binary) is deprecated"
TORCHAO_LINES = "is an Enum subclass and is now natively supported"


@contextmanager
def without_noise(lines: str, warning: str | None = None) -> Iterator[None]:
    """Hold back known lines on stdout and stderr, and known warnings, by their text.

    Other lines appear on stderr at the end. Standard error is taken from the whole process: C++
    libraries write to it by its number.

    Args:
        lines: regular expression that is searched in each line.
        warning: regular expression for the start of a warning's text; None for none.
    """
    noise, printed = re.compile(lines), io.StringIO()
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
                if warning:
                    warnings.filterwarnings("ignore", warning)
                yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            native.seek(0)
            said = printed.getvalue() + native.read().decode(errors="replace")
            for line in re.split(r"[\r\n]+", said):
                if line.strip() and not noise.search(line):
                    print(line, file=sys.stderr)
