"""Freed memory is used again, without the system's help."""

import platform

import pytest

from mobileone.io import allocator
from tests.helpers.processes import run_python

PROGRAM = """
import resource, runpy, sys
import numpy
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
print(keep_freed_memory() if "keep" in sys.argv else None)
for attempt in range(6):
    if attempt == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [numpy.ones(2**22) for _ in range(2)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words, **variables):
    """What the function returned, and how often the system had to find memory afterwards."""
    done = run_python("-c", PROGRAM, allocator.__file__, *words, variables=variables)
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    said, count = faults("keep")
    assert said == "True" and count < 100
    said, count = faults("keep", MALLOC_MMAP_THRESHOLD_="1000000")
    assert said == "False" and count > 1000
    assert faults()[1] > 1000
