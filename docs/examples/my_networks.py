"""A network with a block of its own; `mobileone fit --imports '[my_networks]' …`."""

from timm.models import register_model
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, outputs, 3, 2), nn.Conv2d(inputs, outputs, 3, 2)

    def forward(self, x):
        return self.a(x) + self.b(x)

    def fuse(self):  # timm's convention: what takes this one's place
        self.a.weight.data += self.b.weight.data
        self.a.bias.data += self.b.bias.data
        return self.a


@register_model
def my_network(pretrained=False, num_classes=10, in_chans=3, **kwargs):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)
    return nn.Sequential(Block(in_chans, 16), nn.ReLU(), *head)
