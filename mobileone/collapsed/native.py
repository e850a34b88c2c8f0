"""The CPU kernels: compiled once a machine with the compiler at hand, called through ctypes.

Nothing needs them. Without a compiler, or with `MOBILEONE_NATIVE=0` in the environment, `library()`
is None and the paths that want it are not chosen. The build takes a few seconds, happens at the
first training step, and stays in `$XDG_CACHE_HOME/mobileone` (default `~/.cache/mobileone`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "affine",
    "affine_grad",
    "channel_moments",
    "depthwise_careful_moments",
    "depthwise_forward",
    "depthwise_input_grad",
    "depthwise_moments",
    "depthwise_weight_grad",
    "fits",
    "gradient_sums",
    "gram",
    "library",
    "row_products",
]

log = logging.getLogger(__name__)

_SOURCES = ("depthwise.cpp", "gram.cpp", "pointwise.cpp")
_HEADERS = ("planes.h", "moments.h", "input_gradient.h")
# sums may be reordered to use vectors; NaN and infinity keep their meaning
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Build or find the kernels; None where that is impossible or unwanted."""
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None
    )
    if os.environ.get("MOBILEONE_NATIVE", "1") == "0" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no native kernels for collapsed training: %s", error)
        return None


def _build(compiler: str) -> Path:
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    headers = [Path(__file__).with_name(name) for name in _HEADERS]
    # the compiler's own macros tell its version and what this processor can do
    probe = (compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    macros = subprocess.run(probe, check=True, capture_output=True, timeout=60).stdout
    parts = [
        macros,
        " ".join(_FLAGS).encode(),
        *(path.read_bytes() for path in (*sources, *headers)),
    ]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobileone"
    built = cache / f"collapsed-{digest}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / built.name
            command = [compiler, *_FLAGS, *map(str, sources), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            fresh.replace(built)  # whole, also when several processes build at once
    return built


def fits(x: Tensor) -> bool:
    """Whether the kernels are at hand for a tensor of this device, dtype and layout."""
    ordinary = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    return ordinary and library() is not None


def depthwise_moments(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean (C, 9) and biased covariance (C, 9, 9), float64, of the 3×3 windows of x."""
    channels = x.shape[1]
    mean = torch.empty(channels, 9, dtype=torch.float64)
    cov = torch.empty(channels, 9, 9, dtype=torch.float64)
    _call("depthwise_moments", *x.shape, stride, x, mean, cov)
    return mean, cov


def depthwise_careful_moments(
    x: Tensor, stride: int, which: Tensor, mean: Tensor, cov: Tensor
) -> None:
    """Write the same, summed in float64, for the channels of indices `which` (int64)."""
    _call("depthwise_careful_moments", *x.shape, stride, x, len(which), which, mean, cov)


def depthwise_forward(
    x: Tensor, stride: int, shift: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    """Convolve x − shift with weight (C, 9) and bias (C), float64, and rectify on demand.

    The padding is 0 − shift; shift is (C,), float32.
    """
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    _call("depthwise_forward", *x.shape, stride, x, shift, weight, bias, int(relu), y)
    return y


def depthwise_weight_grad(
    g: Tensor, y: Tensor | None, x: Tensor, stride: int, mean: Tensor, thin: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ g (x − m) (C, 9) and Σ g (C), float64, over the windows; m is (C, 9), float64.

    g counts where the rectifier let it through, y > 0; y is None where there is no rectifier.
    Channels that are thin, (C,) booleans, are summed in float64.
    """
    weight_grad = torch.empty(x.shape[1], 9, dtype=torch.float64)
    bias_grad = torch.empty(x.shape[1], dtype=torch.float64)
    _call("depthwise_weight_grad", *x.shape, stride, g, y, x, mean, thin, weight_grad, bias_grad)
    return weight_grad, bias_grad


def depthwise_input_grad(
    g: Tensor,
    y: Tensor | None,
    x: Tensor,
    stride: int,
    weight: Tensor,
    slope: Tensor,
    offset: Tensor,
    shift: Tensor,
) -> Tensor:
    """∂L/∂x; a window x receives slope · (x − shift) + offset besides Ŵᵀg.

    Slope (C, 9, 9) and offset (C, 9) are in float64, shift (C,) in float32.
    """
    dx = torch.empty_like(x)
    _call("depthwise_input_grad", *x.shape, stride, g, y, x, shift, weight, slope, offset, dx)
    return dx


def row_products(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
    """Σ a (b − shift)ᵀ, (G, A, J) in float64, of a (M, G, A, L), b (M, G, J, L), shift (G, J)."""
    batch, groups, rows, length = b.shape
    products = torch.empty(groups, a.shape[2], rows, dtype=torch.float64)
    _call("row_products", batch, groups, a.shape[2], rows, length, a, b, shift, products, None)
    return products


def gram(b: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (b − shift) (b − shift)ᵀ, (G, J, J), and Σ (b − shift), (G, J), likewise."""
    batch, groups, rows, length = b.shape
    products = torch.empty(groups, rows, rows, dtype=torch.float64)
    sums = torch.empty(groups, rows, dtype=torch.float64)
    _call("row_products", batch, groups, rows, rows, length, None, b, shift, products, sums)
    return products, sums


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C) and biased variance (C), float64, of x (N, C, H, W)."""
    mean = torch.empty(x.shape[1], dtype=torch.float64)
    var = torch.empty_like(mean)
    _call("channel_moments", *_planes(x), x, mean, var)
    return mean, var


def affine(
    z: Tensor, x: Tensor | None, a: Tensor, c: Tensor | None, b: Tensor, relu: bool, y: Tensor
) -> None:
    """Write a z + c x + b to y, rectified on demand; a, b, c are (C), float32."""
    _call("affine", *_planes(z), z, x, a, c, b, int(relu), y)


def gradient_sums(
    g: Tensor, y: Tensor | None, z: Tensor, x: Tensor | None, mean_z: Tensor, mean_x: Tensor | None
) -> Tensor:
    """Σ g, Σ g (z − μ_z), Σ g (x − μ_x) a channel, (3, C) in float64, behind the rectifier."""
    sums = torch.empty(3, z.shape[1], dtype=torch.float64)
    _call("gradient_sums", *_planes(z), g, y, z, x, mean_z, mean_x, sums)
    return sums


def affine_grad(
    g: Tensor,
    y: Tensor | None,
    z: Tensor,
    a: Tensor,
    s: Tensor,
    r: Tensor,
    accumulate: bool,
    to: Tensor,
) -> None:
    """Write a g + s z + r to `to`, or add it; a, s, r are (C), float32; g behind the rectifier."""
    _call("affine_grad", *_planes(z), g, y, z, a, s, r, int(accumulate), to)


def _planes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Call a kernel on contiguous tensors, with PyTorch's number of threads."""
    kernels = library()
    assert kernels is not None
    converted = [
        ctypes.c_int64(argument)
        if isinstance(argument, int)
        else ctypes.c_void_p(None if argument is None else argument.data_ptr())
        for argument in arguments
    ]
    kernels[name](ctypes.c_int(torch.get_num_threads()), *converted)
