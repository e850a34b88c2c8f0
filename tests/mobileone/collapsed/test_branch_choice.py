"""Branches chosen by keyword: fewer in training, the same network deployed."""

import pytest
import timm
import torch

import mobileone
from mobileone import set_collapse
from mobileone.block import MobileOneBlock


@pytest.mark.parametrize(
    ("chosen", "norms"),
    [
        # mu0: 13 pairs of a 3×3 and a 1×1 block, k = 3, and the stem with k = 1. 19 skips: 9 of
        # the 3×3 blocks have stride 1, 10 of the 1×1 blocks keep their width. 14 scale branches
        ({"use_scale": False}, 26 * 3 + 1 + 19),
        ({"use_skip": False}, 26 * 3 + 1 + 14),
        ({"use_scale": False, "use_skip": False, "num_conv_branches": 1}, 27),
        ({"num_conv_branches": 5}, 26 * 5 + 1 + 14 + 19),
    ],
)
def test_chosen_branches_train_collapsed_and_fold(chosen, norms):
    model = timm.create_model("mobileone_mu0", num_classes=3, **chosen).double().train()
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == norms
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    gradients = {}
    for mode in ("always", "never"):
        set_collapse(model, mode)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients[mode] = [p.grad.clone() for p in model.parameters()]
    for ours, theirs in zip(gradients["always"], gradients["never"], strict=True):
        # a factor before a BatchNorm has gradients of exactly 0, where only rounding is left
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max() + 1))
    fused = mobileone.reparameterize(model.eval())
    plain = mobileone.reparameterize(timm.create_model("mobileone_mu0", num_classes=3).eval())
    assert [p.shape for p in fused.parameters()] == [p.shape for p in plain.parameters()]
    assert torch.allclose(fused(x), model(x), rtol=1e-10)


def test_a_pointwise_block_has_no_scale_branch():
    with pytest.raises(ValueError, match="`use_scale`"):
        MobileOneBlock(4, 4, kernel_size=1, use_scale=True)
