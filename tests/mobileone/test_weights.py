"""Weight files of every origin, by every route timm offers."""

import pytest
import timm
import torch
from torch import nn

import mobileone
from mobileone.weights import convert_keys, identify
from tests.helpers.apple import as_apple
from tests.helpers.norms import randomize_bn


def in_lightning(state_dict):
    return {f"model.{k}": v for k, v in state_dict.items()}


MODELS = ["mobileone_mu0", "mobileone_s4"]  # the second with squeeze-and-excitation


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    torch.manual_seed(0)
    model = randomize_bn(timm.create_model(request.param, num_classes=1000)).eval()
    return request.param, model


def files(model):
    fused = mobileone.reparameterize(model).state_dict()
    own = model.state_dict()
    return {
        "timm": own,
        "apple": as_apple(own),
        "apple fused": as_apple(fused),
        "fused": fused,
        "lightning": in_lightning(own),
        "lightning fused": in_lightning(fused),
        "distributed": {f"module.{k}": v for k, v in own.items()},
    }


ORIGINS = ["timm", "apple", "apple fused", "fused", "lightning", "lightning fused", "distributed"]
ROUTES = ["load_state_dict", "checkpoint_path", "pretrained", "nested"]
CASES = [
    (name, origin, route)
    for name in MODELS
    for origin in ORIGINS
    for route in ROUTES
    # a wrapper inside a wrapper is nobody's file
    if (route != "nested" or origin in ("timm", "apple", "apple fused", "fused"))
    # a route does not look at the network
    and (name == MODELS[0] or route == "load_state_dict" or origin == "apple")
]


@pytest.mark.parametrize(("trained", "origin", "route"), CASES, indirect=["trained"])
def test_every_origin_loads_by_every_route(trained, origin, route, tmp_path):
    name, model = trained
    state_dict = files(model)[origin]
    path = tmp_path / "weights.pth"
    if route == "load_state_dict":
        loaded = timm.create_model(name)
        loaded.load_state_dict(state_dict)
    elif route == "checkpoint_path":
        torch.save({"state_dict": state_dict}, path)
        loaded = timm.create_model(name, checkpoint_path=path)
    elif route == "pretrained":
        torch.save(state_dict, path)
        overlay = {"file": str(path), "num_classes": 1000}
        loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        outer = nn.ModuleDict({"backbone": timm.create_model(name)})
        outer.load_state_dict({f"backbone.{k}": v for k, v in state_dict.items()})
        loaded = outer["backbone"]
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_pretrained_apple_weights_adapt_to_classes_and_channels(trained, tmp_path):
    name, model = trained
    torch.save(as_apple(model.state_dict()), tmp_path / "apple.pth")
    loaded = timm.create_model(
        name,
        pretrained=True,
        num_classes=7,
        in_chans=1,
        pretrained_cfg_overlay={"file": str(tmp_path / "apple.pth")},
    ).eval()
    assert loaded(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    expected = model.stem.conv_kxk[0].conv.weight.sum(1, keepdim=True)
    torch.testing.assert_close(loaded.stem.conv_kxk[0].conv.weight, expected)


def test_fused_weights_give_a_fused_model_that_saves_and_loads_again(trained):
    name, model = trained
    fused = mobileone.reparameterize(model)
    once = timm.create_model(name)
    once.load_state_dict(fused.state_dict())
    twice = timm.create_model(name)
    twice.load_state_dict(once.state_dict())
    assert list(twice.state_dict()) == list(fused.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(twice.eval()(x), fused(x))


def test_apple_map_covers_every_key(trained):
    _, model = trained
    for state_dict in (model.state_dict(), mobileone.reparameterize(model).state_dict()):
        assert list(convert_keys(as_apple(state_dict))) == list(state_dict)


@pytest.mark.parametrize("name", sorted(timm.list_models("mobileone_*")))
@pytest.mark.parametrize("fused", [False, True])
def test_identify_names_the_variant(name, fused):
    model = timm.create_model(name, num_classes=11, in_chans=4, device="meta").eval()
    state_dict = (mobileone.reparameterize(model) if fused else model).state_dict()
    info = identify(state_dict)
    assert (info.variant, info.fused, info.num_classes, info.in_chans) == (name, fused, 11, 4)


@pytest.mark.parametrize(
    "wrapped",
    ["_orig_mod.module.", "module._orig_mod.", "model._orig_mod.", "_orig_mod.model.module."],
)
def test_wrappers_are_taken_off_in_any_order(wrapped):
    weights = timm.create_model("mobileone_mu0", num_classes=3).state_dict()
    loaded = timm.create_model("mobileone_mu0", num_classes=3)
    loaded.load_state_dict({f"{wrapped}{k}": v for k, v in weights.items()})
    assert all(torch.equal(v, weights[k]) for k, v in loaded.state_dict().items())
