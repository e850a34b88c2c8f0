"""A network with blocks of its own, as a user registers one with timm: `--imports '[my_networks]'`.

RepVGG's idea (Ding et al., arXiv 2101.03697): a 3×3 and a 1×1 convolution with BatchNorm each, and
BatchNorm by itself, add up in training and fold into one convolution.
"""

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


def _conv_norm(inputs, outputs, size, stride):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class MyBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.wide = _conv_norm(inputs, outputs, 3, stride)
        self.narrow = _conv_norm(inputs, outputs, 1, stride)
        same = inputs == outputs and stride == 1
        self.identity = nn.BatchNorm2d(outputs) if same else None

    def forward(self, x):
        y = self.wide(x) + self.narrow(x)
        return F.relu(y if self.identity is None else y + self.identity(x))

    def fuse(self):
        """The folded block; timm puts it in this one's place."""
        conv, norm = self.wide
        pairs = [(conv.weight, norm), (F.pad(self.narrow[0].weight, [1] * 4), self.narrow[1])]
        if self.identity is not None:
            pairs.append((nn.init.dirac_(torch.empty_like(conv.weight)), self.identity))
        scales = [norm.weight / (norm.running_var + norm.eps).sqrt() for _, norm in pairs]
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1)
        fused.weight.data = sum(
            w * s.view(-1, 1, 1, 1) for (w, _), s in zip(pairs, scales, strict=True)
        ).detach()
        fused.bias.data = sum(
            n.bias - n.running_mean * s for (_, n), s in zip(pairs, scales, strict=True)
        ).detach()
        return nn.Sequential(fused, nn.ReLU())


class MyNetwork(nn.Module):
    def __init__(self, num_classes=1000, in_chans=3, width=8):
        super().__init__()
        self.num_classes = num_classes
        self.blocks = nn.Sequential(
            MyBlock(in_chans, width, 2), MyBlock(width, width, 1), MyBlock(width, 2 * width, 2)
        )
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))

    def get_classifier(self):
        return self.fc


default_cfgs = generate_default_cfgs({"my_repvgg": {"input_size": (3, 32, 32), "classifier": "fc"}})


@register_model
def my_repvgg(pretrained=False, **kwargs):
    return build_model_with_cfg(MyNetwork, "my_repvgg", pretrained, **kwargs)
