"""The CPU kernels, called through ctypes: nothing reaches C that it was not made for.

Nothing needs them. Without a compiler, or with `MOBILEONE_NATIVE=0` in the environment, `library()`
is None and the paths that want it are not chosen.
"""

import ctypes
import functools
import os

import torch
from torch import Tensor

from mobileone.collapsed.cpu_build import load

__all__ = [
    "affine",
    "affine_grad",
    "available",
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

# What the kernels take after the number of threads: integers, and tensors of the types below, which
# may be absent where the letter is large
_SIGNATURES = {
    "depthwise_moments": "iiiiifdd",
    "depthwise_careful_moments": "iiiiifildd",
    "depthwise_forward": "iiiiiffddif",
    "depthwise_weight_grad": "iiiiifFfdbdd",
    "depthwise_input_grad": "iiiiifFffdddf",
    "row_products": "iiiiiFffdD",
    "channel_moments": "iiifdd",
    "affine": "iiifFfFfif",
    "gradient_sums": "iiifFfFfFd",
    "affine_grad": "iiifFffffif",
}
_DTYPES = {"f": torch.float32, "d": torch.float64, "l": torch.int64, "b": torch.bool}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Build or find the kernels; None where that is impossible or unwanted."""
    if os.environ.get("MOBILEONE_NATIVE", "1") == "0":
        return None
    kernels = load()
    if kernels is not None:
        for name, signature in _SIGNATURES.items():
            kinds = [ctypes.c_int64 if kind == "i" else ctypes.c_void_p for kind in signature]
            function = getattr(kernels, name)  # which is kept, unlike kernels[name]
            function.argtypes, function.restype = [ctypes.c_int, *kinds], None
    return kernels


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether there are kernels on this machine."""
    return library() is not None


def fits(x: Tensor) -> bool:
    """Whether there are kernels for a tensor of this device, dtype and layout."""
    ordinary = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    return ordinary and available()


def depthwise_moments(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean (C, 9) and biased covariance (C, 9, 9), float64, of the 3×3 patches of x."""
    channels = x.shape[1]
    mean = torch.empty(channels, 9, dtype=torch.float64, device=x.device)
    cov = torch.empty(channels, 9, 9, dtype=torch.float64, device=x.device)
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
    g: Tensor, y: Tensor | None, x: Tensor, stride: int, mean: Tensor, ill_conditioned: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ g (x − m) (C, 9) and Σ g (C), float64, over the patches; m is (C, 9), float64.

    g counts where the rectifier let it through, y > 0; y is None where there is no rectifier.
    Ill-conditioned channels, (C,) booleans, are summed in float64.
    """
    weight_grad = torch.empty(x.shape[1], 9, dtype=torch.float64, device=x.device)
    bias_grad = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    sums = weight_grad, bias_grad
    _call("depthwise_weight_grad", *x.shape, stride, g, y, x, mean, ill_conditioned, *sums)
    return sums


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
    """∂L/∂x; a patch x receives slope · (x − shift) + offset in addition to Ŵᵀg.

    Slope (C, 9, 9) and offset (C, 9) are in float64, shift (C,) in float32.
    """
    dx = torch.empty_like(x)
    _call("depthwise_input_grad", *x.shape, stride, g, y, x, shift, weight, slope, offset, dx)
    return dx


def row_products(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
    """Σ a (b − shift)ᵀ, (G, A, J) in float64, of a (M, G, A, L), b (M, G, J, L), shift (G, J)."""
    batch, groups, rows, length = b.shape
    products = torch.empty(groups, a.shape[2], rows, dtype=torch.float64, device=b.device)
    _call("row_products", batch, groups, a.shape[2], rows, length, a, b, shift, products, None)
    return products


def gram(b: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (b − shift) (b − shift)ᵀ, (G, J, J), and Σ (b − shift), (G, J), likewise."""
    batch, groups, rows, length = b.shape
    products = torch.empty(groups, rows, rows, dtype=torch.float64, device=b.device)
    sums = torch.empty(groups, rows, dtype=torch.float64, device=b.device)
    _call("row_products", batch, groups, rows, rows, length, None, b, shift, products, sums)
    return products, sums


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C) and biased variance (C), float64, of x (N, C, H, W)."""
    mean = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
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
    sums = torch.empty(3, z.shape[1], dtype=torch.float64, device=z.device)
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
    """Call a kernel, with PyTorch's number of threads.

    Raises:
        TypeError: An argument is not what the kernel reads: C would not notice.
    """
    kernels = library()
    assert kernels is not None
    converted = [
        argument if isinstance(argument, int) else _address(name, argument, kind)
        for argument, kind in zip(arguments, _SIGNATURES[name], strict=True)
    ]
    getattr(kernels, name)(torch.get_num_threads(), *converted)


def _address(name: str, tensor: Tensor | None, kind: str) -> int | None:
    if tensor is None and kind.isupper():
        return None
    if (
        tensor is None
        or tensor.dtype is not _DTYPES.get(kind.lower())
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or (tensor.numel() > 0 and tensor.data_ptr() == 0)  # a wrapper's, whose data are elsewhere
    ):
        what = "None" if tensor is None else f"{tensor.dtype} on {tensor.device}"
        raise TypeError(f"the kernel {name} takes no {what} of this layout as {kind!r}")
    return tensor.data_ptr()
