"""The CPU kernels, built by other compilers and for other processors, compute the same."""

import platform
import shutil
import subprocess

import pytest

from mobileone.collapsed import cpu_build as build
from tests.helpers.paths import PROGRAMS

FOLDER = build.__file__.rpartition("/")[0]
FLAGS = [flag for flag in build._FLAGS if flag not in ("-march=native", "-fPIC", "-shared")]
BUILDS = {  # compiler, more flags, what runs the program
    "clang": ("clang++", ["-march=native", "-Wno-everything"], []),
    "AVX2": ("g++", ["-march=x86-64-v3", "-Wno-psabi"], []),
    "SSE2": ("g++", ["-march=x86-64", "-Wno-psabi"], []),
    "64-bit Arm": ("aarch64-linux-gnu-g++", ["-static"], ["qemu-aarch64"]),
}


def numbers(folder, compiler, flags, runner):
    program = folder / "kernels"
    sources = [f"{FOLDER}/{name}" for name in build._SOURCES]
    command = [compiler, *FLAGS, *flags, f"-I{FOLDER}", PROGRAMS / "cpu_kernels.cpp", *sources]
    subprocess.run([*command, "-o", program], check=True, capture_output=True)
    done = subprocess.run([*runner, program], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_other_builds_compute_the_same(kind, tmp_path):
    compiler, flags, runner = BUILDS[kind]
    absent = [tool for tool in ("g++", compiler, *runner) if shutil.which(tool) is None]
    if absent or ("x86" in " ".join(flags) and platform.machine() != "x86_64"):
        pytest.skip(f"needs {', '.join(absent) or 'an x86-64 processor'}")
    expected = numbers(tmp_path, "g++", ["-march=native"], [])
    found = numbers(tmp_path, compiler, flags, runner)
    assert len(found) == len(expected) > 20000
    assert all(abs(a - b) < 2e-6 * (1 + abs(b)) for a, b in zip(found, expected, strict=True))
