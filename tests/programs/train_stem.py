"""Gradients of the stem in channels-last against those in planes.

oneDNN's fault in strided 1×1 convolutions of few channels ends the process or hangs it, hence a
process of its own; at 16 images of 224 px it never went unnoticed.
"""

import torch

from mobileone import MobileOneBlock, set_collapse

block = MobileOneBlock(3, 48, stride=2, num_conv_branches=1)
set_collapse(block, "never")
x = torch.randn(16, 3, 224, 224)
gradients = []
for layout in (torch.contiguous_format, torch.channels_last):
    block.zero_grad()
    block.to(memory_format=layout)
    block(x.to(memory_format=layout)).square().sum().backward()
    gradients.append([p.grad.clone() for p in block.parameters()])
for plain, last in zip(*gradients, strict=True):
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
