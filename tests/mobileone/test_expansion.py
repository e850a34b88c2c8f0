"""Fused weights come back as branches that compute the same, in float64."""

import copy

import pytest
import timm
import torch

import mobileone
from tests.helpers.branches import by_branches
from tests.helpers.norms import randomize_bn
from tests.helpers.variants import slow


@pytest.fixture(scope="module")
def shapes():
    return torch.randn(2, 3, 48, 48, dtype=torch.float64)


def expanded(name, prepare=randomize_bn, **options):
    """A network's fused form in float64, and a fresh network with its weights expanded."""
    source = prepare(timm.create_model(name, **options).double())
    fused = mobileone.reparameterize(source.eval())
    model = timm.create_model(name, **options).double()
    model.load_state_dict(mobileone.expand(model, fused.state_dict()))
    return fused, model


@pytest.mark.parametrize("name", ["mobileone_s0", slow("mobileone_s4"), "mobileone_mu1"])
def test_expanded_weights_compute_what_the_fused_ones_do(name, shapes):
    fused, model = expanded(name)
    expected = fused(shapes)
    # and once more as the plain sum of the branches, which eval mode does not compute
    for network in (model.eval(), by_branches(model)):
        error = (network(shapes) - expected).abs().max() / expected.abs().max()
        assert error < 1e-10


def test_the_other_branches_can_learn(shapes):
    _, model = expanded("mobileone_mu0")
    block = model.stages[1][2]
    model.train()(shapes).square().mean().backward()
    kernels = [branch.conv.weight for branch in block.conv_kxk]
    assert len(kernels) > 1
    assert not torch.equal(kernels[0], kernels[1])
    for branch in [*block.conv_kxk, block.conv_scale]:
        assert branch.bn.weight.grad.abs().max() > 0


def test_calibrated_weights_compute_the_same_in_training_mode():
    """Exactly on the batch that they were calibrated on, so in expectation on others."""
    torch.manual_seed(3)
    images = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)

    @torch.no_grad()
    def seen(source):
        source(images[0])  # statistics that are not a fresh layer's
        return source

    fused, model = expanded("mobileone_mu1", seen, num_classes=5)
    expected = fused(images[0])

    def error(training):
        copied = copy.deepcopy(model).train(training)
        return float((copied(images[0]) - expected).norm().detach() / expected.norm().detach())

    assert error(training=True) > 0.5
    mobileone.calibrate(model, iter(images))
    assert error(training=False) < 1e-6
    mobileone.calibrate(model, iter(images[:1]))
    assert model.training
    assert error(training=False) < 1e-6
    assert error(training=True) < 1e-6
    block = model.stages[1][2]
    model(images[0]).square().mean().backward()
    assert all(branch.bn.weight.grad.abs().max() > 0 for branch in block.conv_kxk)


def test_calibrating_needs_images_and_leaves_frozen_norms():
    model = timm.create_model("mobileone_mu0")
    with pytest.raises(ValueError, match="no images to calibrate on"):
        mobileone.calibrate(model, [])
    model.stem.requires_grad_(False)
    mobileone.calibrate(model, [torch.randn(2, 3, 32, 32)])
    assert (model.stem.conv_kxk[0].bn.running_mean == 0).all()
    assert (model.stages[0][0].conv_kxk[0].bn.running_mean != 0).any()


def test_weights_of_another_model_are_refused():
    fused = mobileone.reparameterize(timm.create_model("mobileone_s1").eval()).state_dict()
    with pytest.raises(ValueError, match=r"`stem\.reparam_conv\.weight` is .*not the fused form"):
        mobileone.expand(timm.create_model("mobileone_s0"), fused)
    with pytest.raises(ValueError, match="is missing"):
        mobileone.expand(timm.create_model("mobileone_s0"), {})
