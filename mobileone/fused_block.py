"""The deployed form of a MobileOne block."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="return-value"

from torch import Tensor, nn

__all__ = ["FusedMobileOneBlock"]


class FusedMobileOneBlock(nn.Module):
    """The deployed form of a block: convolution with bias -> attention -> activation.

    Args:
        conv: The folded convolution; the input (N, C_in, H, W) goes through it first.
        attn: Squeeze-and-excite or `nn.Identity`.
        act: The activation.
    """

    def __init__(self, conv: nn.Conv2d, attn: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.reparam_conv = conv
        self.attn = attn
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        return self.act(self.attn(self.reparam_conv(x)))

    def fuse(self) -> "FusedMobileOneBlock":
        """Return the block itself: it is folded already."""
        return self
