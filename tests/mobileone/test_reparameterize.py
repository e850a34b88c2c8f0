"""Exact folding of whole models, in every state a model can be in."""

import io
import warnings

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mobileone
from mobileone import FusedMobileOneBlock, MobileOneBlock
from tests.helpers.branches import by_branches
from tests.helpers.norms import randomize_bn
from tests.helpers.variants import middle_is_slow

FAMILY = sorted(timm.list_models("mobileone_*"))
FOLDERS = {"ours": mobileone.reparameterize, "timm": reparameterize_model}


def relative_error(y, expected):
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", middle_is_slow(FAMILY))
def test_folding_is_exact(name):
    model = randomize_bn(timm.create_model(name, num_classes=5).double()).eval()
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = by_branches(model)(x)
        assert relative_error(model(x), expected) < 1e-10
        for fold in FOLDERS.values():
            assert relative_error(fold(model)(x), expected) < 1e-10


def test_original_stays_and_nothing_but_the_plain_network_remains():
    model = randomize_bn(timm.create_model("mobileone_s4")).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = mobileone.reparameterize(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, MobileOneBlock | _BatchNorm) for m in fused.modules())
    assert list(fused.buffers()) == []
    blocks = [m for m in fused.modules() if isinstance(m, FusedMobileOneBlock)]
    assert len(blocks) == 43
    tensors = [v for b in blocks for v in vars(b).values() if isinstance(v, torch.Tensor)]
    assert tensors == []


@pytest.mark.parametrize("fold", FOLDERS.values(), ids=FOLDERS)
def test_folding_twice_changes_nothing(fold):
    fused = fold(timm.create_model("mobileone_mu0").eval())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fold(fused)(x), fused(x))


@pytest.mark.parametrize("fold", FOLDERS.values(), ids=FOLDERS)
def test_nested_models_and_lone_blocks_fold(fold):
    nested = nn.Sequential(nn.ModuleDict({"net": timm.create_model("mobileone_mu0")})).eval()
    assert not any(isinstance(m, _BatchNorm) for m in fold(nested).modules())
    assert isinstance(mobileone.reparameterize(MobileOneBlock(4, 4).eval()), FusedMobileOneBlock)


@pytest.mark.parametrize(
    ("convert", "kind", "training"),
    [
        (convert_sync_batchnorm, nn.SyncBatchNorm, False),
        (nn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm, False),
        (freeze_batch_norm_2d, None, False),
        (freeze_batch_norm_2d, None, True),
    ],
)
def test_folds_after_conversion_of_the_norms(convert, kind, training):
    model = randomize_bn(timm.create_model("mobileone_mu0").double()).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    converted = convert(model).train(training)
    norms = [m for m in converted.modules() if isinstance(m, _BatchNorm)]
    if kind is None:
        assert not norms
        assert relative_error(converted(x), expected) < 1e-10
    else:
        assert norms and all(isinstance(m, kind) for m in norms)
    assert relative_error(mobileone.reparameterize(converted)(x), expected) < 1e-10


def test_folds_with_dilation():
    model = timm.create_model("mobileone_mu0", output_stride=8, dtype=torch.float64)
    model = randomize_bn(model).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert relative_error(mobileone.reparameterize(model)(x), by_branches(model)(x)) < 1e-10


def test_folds_on_the_meta_device():
    fused = mobileone.reparameterize(timm.create_model("mobileone_s4", device="meta").eval())
    assert all(p.is_meta for p in fused.parameters())
    assert fused(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_half_precision_is_folded_in_float32():
    block = randomize_bn(MobileOneBlock(8, 8, groups=8, num_conv_branches=4)).bfloat16().eval()
    fused = block.fuse()
    assert fused.reparam_conv.weight.dtype == torch.bfloat16
    exact, _ = MobileOneBlock.fold(block.double())
    # one rounding of the exact kernel, not one an operation
    assert torch.equal(fused.reparam_conv.weight, exact.bfloat16())


@pytest.mark.parametrize("fold", FOLDERS.values(), ids=FOLDERS)
def test_folding_in_training_mode_warns_once_and_uses_running_statistics(fold):
    model = randomize_bn(timm.create_model("mobileone_mu0").double()).train()
    for _ in range(2):  # for each model that is folded, not once a process
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fused = fold(model)
        assert len(caught) == 1
        assert "training mode" in str(caught[0].message)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert relative_error(fused.eval()(x), model.eval()(x)) < 1e-10


def test_flags_carry_over():
    block = MobileOneBlock(4, 4).eval().requires_grad_(False)
    fused = block.fuse()
    assert not fused.training and not fused.reparam_conv.training
    assert not any(p.requires_grad for p in fused.parameters())
    model = timm.create_model("mobileone_mu0").eval()
    assert not mobileone.reparameterize(model).training


def test_folding_without_running_statistics_is_refused():
    block = MobileOneBlock(4, 4)
    block.identity = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="keeps no running mean and variance"):
        block.fuse()


def test_fused_model_is_saved_and_loaded_whole():
    fused = mobileone.reparameterize(randomize_bn(timm.create_model("mobileone_mu0")).eval())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.load(file, weights_only=False)(x), fused(x))


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8"])
def test_other_timm_models_fold_too(name):
    model = randomize_bn(timm.create_model(name, num_classes=3).double()).eval()
    fused = mobileone.reparameterize(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert relative_error(fused(x), model(x)) < 1e-9
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())
