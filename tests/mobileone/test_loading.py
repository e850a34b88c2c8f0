"""Weights that do not fit: what the user reads, and that the model stays what it was."""

from collections import OrderedDict
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import nn

import mobileone
from mobileone import FusedMobileOneBlock, MobileOneBlock
from mobileone.model import MobileOne
from mobileone.variants import Variant
from tests.helpers.norms import randomize_bn

TINY = Variant((1, 1, 1, 1), (0.25, 0.25, 0.25, 0.25))  # no row of the family


def mu0(**kwargs):
    return timm.create_model("mobileone_mu0", **{"num_classes": 3, **kwargs}).eval()


def fused_weights(model):
    return mobileone.reparameterize(model.eval()).state_dict()


def fuse_stem(model):
    model.stem = model.stem.fuse()
    return model


@contextmanager
def refused(model, match):
    """Loading raises one readable sentence and leaves structure and weights alone."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match=match) as info:
        yield info
    assert len(str(info.value)) < 400, str(info.value)[:1000]
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("other", "description"),
    [
        (lambda: mu0(num_classes=5), r"look like mobileone_mu0 \({form}, 5 classes"),
        (lambda: mu0(in_chans=1), r"look like mobileone_mu0 \({form}, 3 classes, 1 input"),
        (
            lambda: timm.create_model("mobileone_mu1", num_classes=3),
            r"look like mobileone_mu1 \({form}, 3 classes"
            r".*timm\.create_model\('mobileone_mu1', num_classes=3, in_chans=3\)",
        ),
        (lambda: MobileOne(TINY, num_classes=3), r"of an unknown layout \({form}"),
    ],
    ids=["classes", "channels", "variant", "unknown layout"],
)
def test_another_models_weights_leave_the_model_whole(other, description, fused, strict):
    other, model = other().eval(), mu0()
    weights = fused_weights(other) if fused else other.state_dict()
    form = "fused" if fused else "training form"
    with refused(model, match=description.format(form=form)) as info:
        model.load_state_dict(weights, strict=strict)
    assert "but this model is mobileone_mu0" in str(info.value)
    assert "3 classes" in str(info.value).partition("but this model is")[2]


@pytest.mark.parametrize("fused", [False, True])
def test_two_unknown_layouts_are_told_apart_by_shapes(fused):
    wide = Variant(TINY.depths, (0.25, 0.25, 0.25, 0.5))
    other, model = MobileOne(wide, num_classes=3), MobileOne(TINY, num_classes=3)
    weights = fused_weights(other) if fused else other.state_dict()
    with refused(model, match=r"as this model does, but `\S+` is \(.* and not \("):
        model.load_state_dict(weights, strict=False)
    model.load_state_dict(fused_weights(MobileOne(TINY, num_classes=3)))
    assert isinstance(model.stem, FusedMobileOneBlock)


def test_training_weights_do_not_fit_a_fused_model():
    weights = mu0().state_dict()
    for model in (mobileone.reparameterize(mu0()), fuse_stem(mu0())):
        with refused(model, match="load them into a fresh model"):
            model.load_state_dict(weights)


def test_foreign_weights_are_named_as_such():
    foreign = timm.create_model("resnet18", device="meta").state_dict()
    model = mu0()
    with refused(model, match="not a MobileOne's"):
        model.load_state_dict(foreign)
    with refused(model, match="not a MobileOne's"):
        model.load_state_dict(foreign, strict=False)


def test_a_part_of_a_model_loads_where_the_user_asks_for_no_more():
    weights = {k: v for k, v in mu0().state_dict().items() if k.startswith("head.")}
    model = mu0()
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    assert torch.equal(model.head.fc.weight, weights["head.fc.weight"])
    with refused(model, match="they have no stem"):
        model.load_state_dict(weights)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lost", ["stem.reparam_conv.bias", "stages.1.2.reparam_conv.weight"])
def test_a_folded_block_needs_kernel_and_bias(lost, device, strict):
    weights = fused_weights(mu0())
    del weights[lost]
    model = mu0(device=device)
    kinds = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match=f"lack {lost}: a folded block needs"):
        model.load_state_dict(weights, strict=strict, assign=True)
    assert {n: type(m) for n, m in model.named_modules()} == kinds


def test_fused_weights_without_a_stem_never_convert_the_model():
    weights = {k: v for k, v in fused_weights(mu0()).items() if not k.startswith("stem.")}
    model = mu0()
    with refused(model, match=r"lack stem\.reparam_conv\.weight"):
        model.load_state_dict(weights, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_partly_folded_weights_load_exactly_or_not_at_all(strict):
    source = randomize_bn(mu0())
    x = torch.randn(1, 3, 64, 64)
    expected = source(x)
    weights = fuse_stem(source).state_dict()
    model = mu0()
    with refused(model, match=r"mix folded blocks with 26 in training form \(stages\.0\.0,"):
        model.load_state_dict(weights, strict=strict)
    alike = fuse_stem(mu0())
    alike.load_state_dict(weights, strict=strict)
    torch.testing.assert_close(alike(x), expected)


def test_weights_folded_but_for_the_stem_are_recognized():
    source, model = mu0(), mu0()
    stem = source.stem
    mixed = mobileone.reparameterize(source)
    mixed.stem = stem
    with refused(model, match=r"mix folded blocks with 1 in training form \(stem\)"):
        model.load_state_dict(mixed.state_dict())


def test_fused_weights_with_other_keys_are_refused_before_the_model_changes():
    weights = OrderedDict(fused_weights(mu0()))
    del weights["head.fc.weight"]
    weights["ema.decay"] = torch.tensor(0.9)
    model = mu0()
    with refused(model, match=r"lack head\.fc\.weight and hold ema\.decay, unknown"):
        model.load_state_dict(weights)
    result = model.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["head.fc.weight"], ["ema.decay"])
    assert isinstance(model.stem, FusedMobileOneBlock)


@pytest.mark.parametrize("value", [[0.0, 0.0, 0.0], torch.zeros(())], ids=["list", "scalar"])
def test_an_entry_of_another_kind_is_named(value):
    weights = {**fused_weights(mu0()), "head.fc.bias": value}
    model = mu0()
    with refused(model, match=r"`head\.fc\.bias` is .* and not \(3,\)"):
        model.load_state_dict(weights)


@pytest.mark.parametrize("fused", [False, True])
def test_headless_weights_load_without_the_head(fused):
    source = randomize_bn(mu0())
    weights = fused_weights(source) if fused else source.state_dict()
    body = {k: v for k, v in weights.items() if not k.startswith("head.")}
    loaded = mu0(num_classes=5)
    missing = loaded.load_state_dict(body, strict=False).missing_keys
    assert missing == ["head.fc.weight", "head.fc.bias"]
    assert any(isinstance(m, MobileOneBlock) for m in loaded.modules()) == (not fused)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.forward_features(x), source.forward_features(x))


def test_a_misfit_inside_another_module_is_told_as_shortly():
    outer = nn.ModuleDict({"backbone": mu0()})
    weights = {f"backbone.{k}": v for k, v in fused_weights(mu0(num_classes=5)).items()}
    with refused(outer, match=r"5 classes.*but this model is mobileone_mu0"):
        outer.load_state_dict(weights)
