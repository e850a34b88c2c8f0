"""Exact folding of linear branches with BatchNorm into one convolution: pure tensor functions.

A branch is y = γ (W ∗ x − μ) / sqrt(v + ε) + β with running statistics μ, v. It equals a
convolution with kernel a·W and bias β − a·μ, where a = γ / sqrt(v + ε); branches that are summed
add up to the sum of their kernels and biases (paper, Section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "StridedPointwise",
    "at_least_float32",
    "batch_norm_affine",
    "center_pad",
    "fold_conv_bn",
    "fold_norm_into",
    "identity_kernel",
    "slice_before_1x1",
]


def batch_norm_affine(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Write BatchNorm with running statistics as y = scale · x + shift.

    Args:
        mean: Running mean, shape (C,).
        var: Running variance, shape (C,).
        gamma: Factor of the affine terms, shape (C,), if the layer has them.
        beta: Offset of the affine terms, shape (C,), if the layer has them.
        eps: Added to the variance.

    Returns:
        `scale` and `shift`, each of shape (C,), in float32 or better.
    """
    # the dtype comes from a buffer: FX tracing replaces parameters by proxies, which have none yet
    scale = at_least_float32(var).add(eps).rsqrt()
    shift = -mean.to(scale.dtype)
    if gamma is not None:
        scale = gamma.to(scale.dtype) * scale
    shift = shift * scale
    if beta is not None:
        shift = beta.to(shift.dtype) + shift
    return scale, shift


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision tensors to float32; leave others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fold_conv_bn(weight: Tensor, affine: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Fold a bias-free convolution and the normalization after it.

    Args:
        weight: Kernel of shape (C_out, C_in / groups, K, K).
        affine: Scale and shift of the normalization, each of shape (C_out,).

    Returns:
        Kernel of the same shape and bias of shape (C_out,), in float32 or better.
    """
    scale, shift = affine
    return weight.to(scale.dtype) * scale.reshape(-1, 1, 1, 1), shift


@torch.no_grad()
def fold_norm_into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a BatchNorm with running statistics into the convolution before it, in place.

    Args:
        conv: gets a new weight and a bias, in its own dtype.
        norm: stays as it is; to be taken out by the caller.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    affine = batch_norm_affine(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    weight, bias = fold_conv_bn(conv.weight, affine)
    if conv.bias is not None:
        bias = bias + affine[0] * conv.bias.to(bias.dtype)
    trained = conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=trained)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=trained)


def identity_kernel(channels: int, groups: int, kernel_size: int, like: Tensor) -> Tensor:
    """Kernel of a stride-1 convolution that returns its input.

    Args:
        channels: Input and output channels C.
        groups: Groups of the convolution; divides C.
        kernel_size: Odd kernel size K.
        like: Tensor whose device and dtype the kernel takes.

    Returns:
        Kernel of shape (C, C / groups, K, K).
    """
    per_group = channels // groups
    eye = torch.eye(per_group, device=like.device, dtype=like.dtype)
    return center_pad(eye.repeat(groups, 1)[:, :, None, None], kernel_size)


def center_pad(weight: Tensor, kernel_size: int) -> Tensor:
    """Zero-pad a 1×1 kernel to K×K about its center: (O, I, 1, 1) -> (O, I, K, K)."""
    margin = kernel_size // 2
    return F.pad(weight, [margin, margin, margin, margin])


class StridedPointwise(nn.Conv2d):
    """The same function as `nn.Conv2d` with a 1×1 kernel, a stride and no padding.

    It takes the pixels that the stride leaves and convolves them with stride 1. PyTorch on a CPU
    computes the weight gradient of the convolution as such by oneDNN, which writes past its
    buffer where there are fewer than 16 channels in channels-last: the process dies, hangs, or
    continues with wrong numbers (oneDNN issue 6035; seen with torch 2.14). That is MobileOne's
    stem, and compilers choose channels-last.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, ⌈H / stride⌉, ⌈W / stride⌉)."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


def slice_before_1x1(conv: nn.Conv2d) -> None:
    """Turn a 1×1 convolution, not depthwise, into a `StridedPointwise` where it has a stride.

    Args:
        conv: Is changed in place; parameters, hooks and attributes stay.
    """
    ordinary = type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.padding == (0, 0)
    if ordinary and conv.groups == 1 and conv.stride != (1, 1):
        conv.__class__ = StridedPointwise
