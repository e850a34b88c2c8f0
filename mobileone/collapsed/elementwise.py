"""The elementwise passes around a pointwise product, on the CPU kernels or in PyTorch."""

import torch
from torch import Tensor

from mobileone.collapsed import cpu_kernels as native

__all__ = ["affine", "affine_grad", "channel_moments", "gradient_sums"]


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C) and biased variance (C) of x (N, C, H, W) in float64, about the mean."""
    if native.fits(x):
        return native.channel_moments(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean, var


def affine(
    z: Tensor, x: Tensor | None, a: Tensor, c: Tensor | None, b: Tensor, relu: bool
) -> Tensor:
    """y = a z + c x + b a channel, rectified on demand; a, b, c are (C), in z's dtype."""
    if native.fits(z):
        y = torch.empty_like(z)
        native.affine(z, x, a, c, b, relu, y)
        return y
    y = torch.addcmul(_per_channel(b), _per_channel(a), z)
    if x is not None and c is not None:
        y.addcmul_(_per_channel(c), x)
    return y.relu_() if relu else y


def gradient_sums(
    g: Tensor, y: Tensor | None, z: Tensor, x: Tensor | None, mean_z: Tensor, mean_x: Tensor | None
) -> Tensor:
    """Σ g, Σ g (z − μ_z), Σ g (x − μ_x) a channel, (3, C) in float64.

    g counts where the rectifier let it through, y > 0; y is None where there is no rectifier.
    Without x the third row has no meaning.
    """
    if native.fits(z):
        return native.gradient_sums(g, y, z, x, mean_z, mean_x)
    passed = _passed(g, y)
    rows = [passed, passed * (z - _per_channel(mean_z))]
    rows.append(rows[1] if x is None or mean_x is None else passed * (x - _per_channel(mean_x)))
    return torch.stack([row.sum((0, 2, 3), dtype=torch.float64) for row in rows])


def affine_grad(
    g: Tensor, y: Tensor | None, z: Tensor, a: Tensor, s: Tensor, r: Tensor, total: Tensor | None
) -> Tensor:
    """a g + s z + r a channel, added to `total` in place where given; g as in `gradient_sums`."""
    if native.fits(z):
        to = torch.empty_like(z) if total is None else total
        native.affine_grad(g, y, z, a, s, r, total is not None, to)
        return to
    value = torch.addcmul(_per_channel(r), _per_channel(a), _passed(g, y))
    value.addcmul_(_per_channel(s), z)
    return value if total is None else total.add_(value)


def _passed(g: Tensor, y: Tensor | None) -> Tensor:
    return g if y is None else torch.ops.aten.threshold_backward(g, y, 0)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]
