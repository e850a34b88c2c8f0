"""A strided 1×1 convolution that reads only the pixels it needs."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["StridedPointwise", "read_needed_pixels"]


class StridedPointwise(nn.Conv2d):
    """The same function as `nn.Conv2d` with a 1×1 kernel, a stride and no padding.

    It takes the pixels that the stride leaves and convolves them with stride 1. PyTorch on a CPU
    computes the weight gradient of the convolution as such by oneDNN, which writes past its
    buffer where there are fewer than 16 channels in channels-last: the process dies, hangs, or
    goes on with wrong numbers (oneDNN issue 6035; seen with torch 2.14). That is MobileOne's
    stem, and compilers choose channels-last.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, ⌈H / stride⌉, ⌈W / stride⌉)."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


def read_needed_pixels(conv: nn.Conv2d) -> None:
    """Turn a 1×1 convolution, not depthwise, into a `StridedPointwise` where it has a stride.

    Args:
        conv: Is changed in place; parameters, hooks and attributes stay.
    """
    ordinary = type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.padding == (0, 0)
    if ordinary and conv.groups == 1 and conv.stride != (1, 1):
        conv.__class__ = StridedPointwise
