"""Activations whose coefficients depend on the input, which the paper measures in Table 2."""

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["DynamicReLU", "DynamicShiftMax"]


def _hyper_function(channels: int, coefficients: int, reduction: int) -> nn.Sequential:
    """Coefficients in (0, 1) from the image as a whole: (N, C, H, W) -> (N, coefficients, 1, 1)."""
    hidden = max(1, channels // reduction)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, coefficients, 1),
    )


class DynamicReLU(nn.Module):
    r"""Dynamic ReLU (Chen et al., ECCV 2020, arXiv 2003.10027), of two linear pieces.

    y_c = max_k (a_c^k(x) x_c + b_c^k(x)), k = 1, 2, where the coefficients are residuals from
    those of ReLU: a^k = α^k + λ_a (2 σ(θ) − 1), b^k = β^k + λ_b (2 σ(θ) − 1), with α¹ = 1, all
    other α and β 0, λ_a = 1, λ_b = 0.5; θ comes from the pooled input by two layers.

    Args:
        channels: C.
        kind: "A" shares the coefficients among all channels, "B" has them for each channel.
        reduction: Of the hidden layer, 8 in the paper.

    Shape:
        (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int, kind: Literal["A", "B"], reduction: int = 8) -> None:
        super().__init__()
        self.width = 1 if kind == "A" else channels
        self.theta = _hyper_function(channels, 4 * self.width, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        residual = 2 * torch.sigmoid(self.theta(x)) - 1  # (N, 4 · width, 1, 1)
        a1, a2, b1, b2 = residual.split(self.width, dim=1)
        return torch.maximum(x * (1 + a1) + 0.5 * b1, x * a2 + 0.5 * b2)


class DynamicShiftMax(nn.Module):
    r"""Dynamic Shift-Max of MicroNet (Li et al., ICCV 2021, arXiv 2108.05894), J = K = 2.

    y_i = max_k Σ_j a_{i,j}^k(x) x_{(i + j C/G) mod C}, j = 0, 1, k = 1, 2: the larger of two
    combinations of a channel and of the one C/G further on, in a circle. The coefficients are
    residuals from those of ReLU, a_{i,0}^1 = 1 and all others 0, of a hard sigmoid of two layers
    on the pooled input, scaled to (−1, 1).

    Args:
        channels: C, a multiple of G.
        groups: G.
        reduction: Of the hidden layer.

    Shape:
        (N, C, H, W) -> (N, C, H, W).

    Raises:
        ValueError: `groups` does not divide `channels`.
    """

    def __init__(self, channels: int, groups: int = 4, reduction: int = 8) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"`groups` (={groups}) must divide `channels` (={channels})")
        self.shift = channels // groups
        self.channels = channels
        self.theta = _hyper_function(channels, 4 * channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        residual = 2 * nn.functional.hardsigmoid(self.theta(x)) - 1  # (N, 4 C, 1, 1)
        own1, own2, other1, other2 = residual.split(self.channels, dim=1)
        # channel i becomes channel i + C/G of the input, in a circle
        shifted = torch.cat((x[:, self.shift :], x[:, : self.shift]), dim=1)
        return torch.maximum(x * (1 + own1) + shifted * other1, x * own2 + shifted * other2)
