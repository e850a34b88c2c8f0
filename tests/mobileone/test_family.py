"""The registered family against the published counts and timm's own models."""

import pytest
import timm
import torch
from timm.models import byobnet

import mobileone
from tests.helpers.norms import randomize_bn
from tests.helpers.processes import run_python
from tests.helpers.variants import middle_is_slow

# deploy parameters and fvcore's multiply-adds (M) of the fused model at 224 px
PUBLISHED = {
    "mobileone_s0": (2_078_504, 275.2),
    "mobileone_s1": (4_764_840, 825.1),
    "mobileone_s2": (7_808_168, 1298.5),
    "mobileone_s3": (10_078_312, 1895.9),
    "mobileone_s4": (14_838_352, 2979.4),
}
# paper, Table 13 (M parameters, M multiply-adds); mu0's layout is inexact
MICRO = {"mobileone_mu1": (0.98, 139), "mobileone_mu2": (1.3, 214)}
FAMILY = [*sorted(PUBLISHED), "mobileone_mu0", *sorted(MICRO)]


def count(model):
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model):
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, torch.randn(1, 3, 224, 224))
    return analysis.unsupported_ops_warnings(False).total() / 1e6


def test_family_is_registered_from_this_package():
    assert sorted(timm.list_models("mobileone_*")) == sorted(FAMILY)
    for name in FAMILY:
        assert timm.models.model_entrypoint(name).__module__ == "mobileone.registration"


@pytest.mark.parametrize("name", [*sorted(PUBLISHED), *sorted(MICRO)])
def test_deployed_size_is_the_published_one(name):
    fused = mobileone.reparameterize(timm.create_model(name).eval())
    if name in PUBLISHED:
        assert count(fused) == PUBLISHED[name][0]
        assert multiply_adds(fused) == pytest.approx(PUBLISHED[name][1], abs=0.05)
    else:
        assert count(fused) / 1e6 == pytest.approx(MICRO[name][0], rel=0.04)
        assert multiply_adds(fused) == pytest.approx(MICRO[name][1], rel=0.01)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_state_dict_is_timms(name):
    ours, theirs = timm.create_model(name), getattr(byobnet, name)()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert count(ours) == count(theirs)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_pretrained_tag_and_hub_id_are_declared(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.tag, cfg.hf_hub_id) == ("apple_in1k", f"timm/{name}.apple_in1k")
    assert timm.is_model_pretrained(name)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", middle_is_slow(sorted(PUBLISHED)))
def test_function_is_timms(name, mode):
    ours = randomize_bn(timm.create_model(name, num_classes=7).double())
    theirs = getattr(byobnet, name)(num_classes=7).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 3, 65, 96, dtype=torch.float64)
    with torch.no_grad():
        y, expected = (m.train(mode == "train")(x) for m in (ours, theirs))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    for (key, ours_buffer), theirs_buffer in zip(
        ours.named_buffers(), theirs.buffers(), strict=True
    ):
        torch.testing.assert_close(ours_buffer, theirs_buffer, rtol=1e-9, atol=1e-9, msg=key)


def test_create_model_takes_the_usual_arguments():
    model = timm.create_model(
        "mobileone_mu0",
        num_classes=5,
        in_chans=1,
        drop_rate=0.1,
        drop_path_rate=0.1,
        global_pool="avgmax",
        dtype=torch.float64,
    )
    assert model(torch.randn(2, 1, 64, 64, dtype=torch.float64)).shape == (2, 5)
    assert all(p.is_meta for p in timm.create_model("mobileone_s4", device="meta").parameters())


@pytest.mark.parametrize(("output_stride", "reductions"), [(32, 32), (16, 16), (8, 8)])
def test_features_and_output_stride(output_stride, reductions):
    model = timm.create_model("mobileone_mu0", features_only=True, output_stride=output_stride)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [48, 48, 64, 128, 384]
    assert maps[-1].shape[-1] == 64 // reductions
    assert model.feature_info.reduction()[-1] == reductions


def test_dilation_keeps_the_receptive_field():
    """At even positions a dilated network computes what the strided one does."""
    strided = randomize_bn(timm.create_model("mobileone_mu0", num_classes=0, global_pool="")).eval()
    dilated = timm.create_model("mobileone_mu0", num_classes=0, global_pool="", output_stride=16)
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected, y = strided(x), dilated.eval()(x)
    torch.testing.assert_close(y[:, :, ::2, ::2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [4, 64, "32"])
def test_output_stride_is_checked(bad):
    with pytest.raises(ValueError, match="`output_stride`"):
        timm.create_model("mobileone_s0", output_stride=bad)


def test_importing_and_creating_warn_about_nothing_and_load_no_optional_package():
    script = (
        "import sys, timm, mobileone, mobileone.export;"
        "assert not {'lightning', 'coremltools', 'fvcore'} & set(sys.modules);"
        "mobileone.reparameterize(timm.create_model('mobileone_s4', device='meta').eval())"
    )
    run_python("-W", "error", "-c", script)
