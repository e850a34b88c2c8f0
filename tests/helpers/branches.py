"""Blocks computed branch by branch, which eval mode does not do by itself."""

import copy

from torch import nn

from mobileone import MobileOneBlock

__all__ = ["Branches", "by_branches"]


class Branches(nn.Module):
    """What a block computes if nobody folds it: the sum of its branches, then what follows."""

    def __init__(self, block):
        super().__init__()
        found = [*block.conv_kxk, block.conv_scale, block.identity]
        self.branches = nn.ModuleList(branch for branch in found if branch is not None)
        self.attn, self.act = block.attn, block.act

    def forward(self, x):
        return self.act(self.attn(sum(branch(x) for branch in self.branches)))


def by_branches(model):
    """A copy of a network in which every block runs its branches."""
    changed = copy.deepcopy(model)
    for name, block in list(changed.named_modules()):
        if isinstance(block, MobileOneBlock):
            changed.set_submodule(name, Branches(block).train(block.training))
    return changed
