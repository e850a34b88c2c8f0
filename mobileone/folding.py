"""Exact folding of linear branches with BatchNorm into one convolution: pure tensor functions.

A branch is y = γ (W ∗ x − μ) / sqrt(v + ε) + β with running statistics μ, v. It equals a
convolution with kernel a·W and bias β − a·μ, where a = γ / sqrt(v + ε); branches that are summed
add up to the sum of their kernels and biases (paper, Section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["batch_norm_affine", "centre_pad", "fold_conv_bn", "identity_kernel"]


def batch_norm_affine(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Write a BatchNorm with its running statistics as y = scale · x + shift.

    Works for BatchNorm2d, SyncBatchNorm, the frozen ones of timm and torchvision, and for layers
    without affine terms. Computes in float32 or better, whatever the layer's dtype.

    Args:
        bn: A normalisation layer with `running_mean` and `running_var` over C channels.

    Returns:
        `scale` and `shift`, each of shape (C,).

    Raises:
        ValueError: The layer keeps no running statistics, so it has no fixed affine form.
    """
    mean, var = getattr(bn, "running_mean", None), getattr(bn, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise ValueError(
            f"cannot fold {type(bn).__name__}: it has no running mean and variance; use a "
            "BatchNorm with track_running_stats=True (the default)"
        )
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = (var.to(dtype) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = bn.weight.to(dtype) * scale
    shift = -mean.to(dtype) * scale
    if bn.bias is not None:
        shift = bn.bias.to(dtype) + shift
    return scale, shift


def fold_conv_bn(weight: Tensor, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a bias-free convolution and the BatchNorm after it.

    Args:
        weight: Kernel of shape (C_out, C_in / groups, K, K).
        bn: The normalisation over C_out channels.

    Returns:
        Kernel of the same shape and bias of shape (C_out,), in float32 or better.
    """
    scale, shift = batch_norm_affine(bn)
    return weight.to(scale.dtype) * scale.reshape(-1, 1, 1, 1), shift


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
    return centre_pad(eye.repeat(groups, 1)[:, :, None, None], kernel_size)


def centre_pad(weight: Tensor, kernel_size: int) -> Tensor:
    """Zero-pad a 1×1 kernel to K×K about its centre: (O, I, 1, 1) -> (O, I, K, K)."""
    margin = kernel_size // 2
    return F.pad(weight, [margin] * 4)
