"""The network as it is deployed: it computes the same, and nothing unfolded stays."""

import pytest
import timm
import torch
from timm.models import byobnet
from torch import nn

from mobileone.bench.inference import case as module
from mobileone.bench.inference.case import build_form, deploy_form
from mobileone.bench.suites import build_model, choose_models, input_size_of
from tests.helpers.norms import randomize_bn
from tests.helpers.variants import slow_where

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
PLAIN = [
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "torchvision/shufflenet_v2_x1_0",
]


@pytest.mark.parametrize(
    "name", slow_where(PLAIN.__contains__, ["mobileone_s0", "repvgg_a0", "repvit_m0_9", *PLAIN])
)
def test_folding_keeps_the_function_and_leaves_no_norm(name):
    # timm folds RepViT into float32 whatever it was
    dtype, tolerance = (torch.float32, 1e-3) if name == "repvit_m0_9" else (torch.float64, 1e-8)
    model, x = randomize_bn(build_model(name)).to(dtype), X.to(dtype)
    fused, left = deploy_form(model, x)
    torch.testing.assert_close(fused(x), model(x), rtol=tolerance, atol=tolerance)
    assert left == {"branches_left": 0, "norms_left": 0}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())


def test_mobileone_has_the_function_of_timms_own_unfolded_branches():
    theirs = randomize_bn(byobnet.mobileone_s0()).eval().double()
    ours = build_model("mobileone_s0").double()
    ours.load_state_dict(theirs.state_dict())
    fused, _ = deploy_form(ours, X.double())
    torch.testing.assert_close(fused(X.double()), theirs(X.double()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mobileone_mu0", "repvgg_a0", "fastvit_t8", "repvit_m0_9"])
def test_branches_that_were_not_folded_are_named(name, monkeypatch):
    monkeypatch.setattr(module, "reparameterize", module.deepcopy)
    _, left = deploy_form(randomize_bn(timm.create_model(name).eval()), X)
    assert left["branches_left"] > 10


class Reused(nn.Module):
    """Reads a convolution's output both before and after the norm."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.inplace = inplace

    def forward(self, x):
        y = self.conv(x)
        if self.inplace:
            return self.norm(y.relu_())
        return y + self.norm(y)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_that_is_not_the_only_reader_stays(inplace):
    model = randomize_bn(Reused(inplace)).eval()
    fused, left = deploy_form(model, X)
    assert left["norms_left"] == 1
    torch.testing.assert_close(fused(X), model(X))


def test_wrongly_folded_branches_are_refused(monkeypatch):
    def broken(model):
        wrong = module.deepcopy(model)
        with torch.no_grad():
            wrong.head.fc.weight.mul_(1.1)
        return wrong

    monkeypatch.setattr(module, "reparameterize", broken)
    with pytest.raises(RuntimeError, match="changed the output"):
        deploy_form(build_model("mobileone_mu0"), X)


def test_settled_norms_keep_activations_at_ordinary_size():
    fused, _, x = build_form(build_model("mobileone_s1"), 64)
    assert 1e-3 < fused(x).abs().max() < 1e3


def test_models_are_named_or_refused():
    assert choose_models(["mobileone_s0", "mobileone_s0"], None) == (("mobileone_s0",), {})
    with pytest.raises(ValueError, match=r"'mobileone_s9'; did you mean .*mobileone_s"):
        choose_models(["mobileone_s9"], None)
    with pytest.raises(ValueError, match="must be a list"):
        choose_models("mobileone_s0", None)
    with pytest.raises(ValueError, match="is empty"):
        choose_models([], None)
    assert input_size_of(build_model("mobilevit_xxs")) == (3, 256, 256)
    assert input_size_of(nn.ReLU(), 64) == (3, 64, 64)
    assert torch.equal(*(build_model("mobileone_mu0").head.fc.weight for _ in range(2)))
