"""The CPU kernels, called through ctypes: nothing reaches C that it was not made for.

Nothing needs them. Without a compiler, or with `MOBILEONE_NATIVE=0` in the environment, `library()`
is None and the paths that want it are not chosen.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mobileone.collapsed.branches import Geometry
from mobileone.collapsed.cpu_build import load

__all__ = [
    "affine",
    "affine_grad",
    "available",
    "branch_gradients",
    "channel_moments",
    "collapse",
    "depthwise_backward",
    "depthwise_forward",
    "depthwise_input_grad",
    "depthwise_moments",
    "fits",
    "gradient_sums",
    "gram_forward",
    "gram_input_grad",
    "gram_moments",
    "gram_weight_grad",
    "library",
]

# What the kernels take after the number of threads: integers, lists of float32 tensors (p), and
# tensors of the types below, which may be absent where the letter is large
_SIGNATURES = {
    "collapse_float32": "iiiiiiidpddfddddfff",
    "collapse_float64": "iiiiiiidpdddddddddd",
    "branch_gradients_float32": "iiiiiiidpidddddfdffpfd",
    "branch_gradients_float64": "iiiiiiidpidddddddddpdd",
    "depthwise_forward": "iiiiifiiidpifddddb",
    "depthwise_backward": "iiiiifFfiiidpdddbFp",
    "depthwise_moments": "iiiiifdd",
    "depthwise_input_grad": "iiiiifFffdddf",
    "gram_moments": "iiiiiiiiiffdd",
    "gram_forward": "iiiiiiiiiifFffif",
    "gram_weight_grad": "iiiiiiiiiifFfffdd",
    "gram_input_grad": "iiiiiiiiiifFffFffff",
    "channel_moments": "iiifdd",
    "affine": "iiifFfFfif",
    "gradient_sums": "iiifFfFfFd",
    "affine_grad": "iiifFffffif",
}
_DTYPES = {"f": torch.float32, "d": torch.float64, "b": torch.bool}


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


def collapse(
    geometry: Geometry, tensors: Sequence[Tensor], mean: Tensor, moved: Tensor, cov: Tensor
) -> list[Tensor]:
    """Fold a block on m (G, J), m less the origin of the patches, and C (G, J, J).

    Returns:
        In float64 μᵢ and vᵢ, (norms, G, O), and of each convolution what its weights could make of
        the variance, and the variance that it explains, (kernels, G, O); in C's dtype Ŵ (G, O, J),
        b̂ (G, O) and aᵢ (norms, G, O).
    """
    groups, outputs = geometry.groups, geometry.out_chs // geometry.groups
    empty = functools.partial(torch.empty, device=cov.device)
    norms, kernels = ((n, groups, outputs) for n in (geometry.norms, geometry.branches))
    wide = [empty(shape, dtype=torch.float64) for shape in (norms, norms, kernels, kernels)]
    shapes = (groups, outputs, geometry.patch), (groups, outputs), norms
    folded = [*wide, *(empty(shape, dtype=cov.dtype) for shape in shapes)]
    name = f"collapse_{str(cov.dtype).removeprefix('torch.')}"
    _call(name, *_matrices(geometry, tensors), mean, moved, cov, *folded)
    return folded


def branch_gradients(
    geometry: Geometry,
    tensors: Sequence[Tensor],
    number: int,
    sums: Sequence[Tensor],
    means: Sequence[Tensor],
    folded: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients of a block's parameters, and S (G, J, J) and r (G, J) of its patches.

    Args:
        geometry: The block.
        tensors: Its `parameters`.
        number: n.
        sums: Σ g (x − o)ᵀ (G, O, J), Σ g (G, O), and the same before g was centered.
        means: m less o, and less the origin of the patches that S and r are for, (G, J).
        folded: C (G, J, J) and then vᵢ, Ŵ, aᵢ as `collapse` returned them.
    """
    cov = folded[0]
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    slope, offset = torch.empty_like(cov), torch.empty_like(means[0])
    name = f"branch_gradients_{str(cov.dtype).removeprefix('torch.')}"
    block = _matrices(geometry, tensors)
    _call(name, *block, number, *sums, *means, *folded, grads, slope, offset)
    return grads, slope, offset


def depthwise_forward(
    x: Tensor, geometry: Geometry, tensors: Sequence[Tensor], relu: bool
) -> list[Tensor]:
    """A depthwise 3×3 block in training.

    Args:
        x: Input (N, C, H, W).
        geometry: The block.
        tensors: Its `parameters`.
        relu: Rectify the output as well.

    Returns:
        Output (N, C, H', W'); in float64 the branches' means and biased variances (norms, C, 1),
        and m (C, 9) and C (C, 9, 9) of the patches; and which channels took float64 sums, (C,).
    """
    channels, empty = geometry.out_chs, functools.partial(torch.empty, device=x.device)
    y = x.new_empty(len(x), channels, *geometry.output_size(*x.shape[2:]))
    mean, var = (empty(geometry.norms, channels, 1, dtype=torch.float64) for _ in range(2))
    m, cov = (empty(channels, *shape, dtype=torch.float64) for shape in ((9,), (9, 9)))
    careful = empty(channels, dtype=torch.bool)
    block = _block(geometry, tensors)
    results = [y, mean, var, m, cov, careful]
    _call("depthwise_forward", *x.shape, geometry.stride, x, *block, int(relu), *results)
    return results


def depthwise_backward(
    g: Tensor,
    y: Tensor | None,
    x: Tensor,
    geometry: Geometry,
    tensors: Sequence[Tensor],
    statistics: Sequence[Tensor],
    inward: bool,
) -> list[Tensor]:
    """∂L/∂x, empty unless `inward`, and the gradient of every parameter.

    g counts where the rectifier let it through, y > 0; y is None where there is no rectifier.
    `statistics` are the last four results of the forward pass.
    """
    dx = torch.empty_like(x) if inward else None
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    block = _block(geometry, tensors)
    shape = *x.shape, geometry.stride
    _call("depthwise_backward", *shape, g, y, x, *block, *statistics, dx, grads)
    return [x.new_empty(0) if dx is None else dx, *grads]


def depthwise_moments(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean (C, 9) and biased covariance (C, 9, 9), float64, of the 3×3 patches of x."""
    channels = x.shape[1]
    mean = torch.empty(channels, 9, dtype=torch.float64, device=x.device)
    cov = torch.empty(channels, 9, 9, dtype=torch.float64, device=x.device)
    _call("depthwise_moments", *x.shape, stride, x, mean, cov)
    return mean, cov


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


def gram_moments(x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """A shift near the mean of the patches of x, and their moments about it.

    Returns:
        Shift (G, J), in float32; Σ X Xᵀ (G, J, J) and Σ X (G, J), in float64, of patches X less it.
    """
    groups, patch = geometry.groups, geometry.patch
    shift = torch.empty(groups, patch, device=x.device)
    products = torch.empty(groups, patch, patch, dtype=torch.float64, device=x.device)
    sums = torch.empty(groups, patch, dtype=torch.float64, device=x.device)
    _call("gram_moments", *_patches(x, geometry), x, shift, products, sums)
    return shift, products, sums


def gram_forward(
    x: Tensor,
    geometry: Geometry,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
) -> Tensor:
    """Convolve the patches of x less a shift (G, J), and rectify on demand: (N, C_out, H', W').

    Weight (G, O, J) and bias (G, O) are in float32.
    """
    y = x.new_empty(len(x), geometry.out_chs, *geometry.output_size(*x.shape[2:]))
    shape = *_patches(x, geometry), weight.shape[1]
    _call("gram_forward", *shape, x, shift, weight, bias, int(relu), y)
    return y


def gram_weight_grad(
    g: Tensor, y: Tensor | None, x: Tensor, geometry: Geometry, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A center near the mean of g (G, O), in float32, and the sums about it and a shift (G, J).

    g counts where the rectifier let it through, y > 0; y is None where there is no rectifier.

    Returns:
        Center; Σ (g − center)(x − shift)ᵀ (G, O, J) and Σ (g − center) (G, O), in float64.
    """
    groups, outputs = geometry.groups, geometry.out_chs // geometry.groups
    center = torch.empty(groups, outputs, device=x.device)
    products = torch.empty(groups, outputs, geometry.patch, dtype=torch.float64, device=x.device)
    sums = torch.empty(groups, outputs, dtype=torch.float64, device=x.device)
    shape = *_patches(x, geometry), outputs
    _call("gram_weight_grad", *shape, g, y, x, shift, center, products, sums)
    return center, products, sums


def gram_input_grad(
    g: Tensor,
    y: Tensor | None,
    center: Tensor,
    x: Tensor,
    geometry: Geometry,
    shift: Tensor | None,
    weight: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """What the patches of x receive: Ŵᵀ(g − center) + slope · (x − shift) + offset, (N, G, J, L).

    All in float32: weight (G, O, J), slope (G, J, J), offset and shift (G, J); g as above.
    """
    length = g.shape[2] * g.shape[3]
    to = torch.empty(len(x), geometry.groups, geometry.patch, length, device=x.device)
    shape = *_patches(x, geometry), weight.shape[1]
    _call("gram_input_grad", *shape, g, y, center, x, shift, weight, slope, offset, to)
    return to


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


def _matrices(geometry: Geometry, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """A block as matrices: G, O, J, taps of a channel, and then as `_block`."""
    groups, outputs = geometry.groups, geometry.out_chs // geometry.groups
    block = _block(geometry, tensors)
    return groups, outputs, geometry.patch, geometry.kernel_size**2, *block


def _patches(x: Tensor, geometry: Geometry) -> tuple[int, ...]:
    shape = len(x), geometry.groups, x.shape[1] // geometry.groups, *x.shape[2:]
    return *shape, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation


def _planes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _block(
    geometry: Geometry, tensors: Sequence[Tensor]
) -> tuple[int, int, int, Tensor, list[Tensor]]:
    """Convolutions, BatchNorms, taps of the last kernel, each ε, and the parameters."""
    count = geometry.branches
    eps = torch.tensor(geometry.eps, dtype=torch.float64, device="cpu")
    rows = [tensor.contiguous() for tensor in tensors]  # kernels may be in channels-last
    return count, geometry.norms, tensors[count - 1][0].numel(), eps, rows


def _call(name: str, *arguments: Tensor | list[Tensor] | int | None) -> None:
    """Call a kernel, with PyTorch's number of threads.

    Raises:
        TypeError: An argument is not what the kernel reads: C would not notice.
    """
    kernels = library()
    assert kernels is not None
    converted = [
        _converted(name, argument, kind)
        for argument, kind in zip(arguments, _SIGNATURES[name], strict=True)
    ]
    getattr(kernels, name)(torch.get_num_threads(), *converted)


def _converted(name: str, argument: Tensor | list[Tensor] | int | None, kind: str) -> Any:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, list):
        return (ctypes.c_void_p * len(argument))(*(_address(name, t, "f") for t in argument))
    return _address(name, argument, kind)


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
