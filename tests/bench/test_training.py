"""The training benchmark: it measures what it names."""

import json

import pytest
import timm
import torch
from torch import nn

from mobileone import MobileOneBlock
from mobileone.bench.contenders import CONTENDERS, build_contender, plain_network
from mobileone.bench.memory import kept_bytes, peak_bytes
from mobileone.bench.training import benchmark_training

EAGER = ["timm", "ours", "ours always", "plain"]


def test_the_plain_net_has_the_fused_topology():
    model = timm.create_model("mobileone_s4", num_classes=7)
    plain = plain_network(model)
    assert not any(isinstance(module, MobileOneBlock) for module in plain.modules())
    fused = [(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.groups)
             for m in model.modules() if isinstance(m, MobileOneBlock)
             for m in [m.conv_kxk[0].conv]]  # fmt: skip
    convs = [
        m for name, m in plain.named_modules() if name.endswith(".conv") or name == "stem.conv"
    ]
    assert [
        (c.in_channels, c.out_channels, c.kernel_size, c.stride, c.groups) for c in convs
    ] == fused
    assert sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) == len(fused)
    assert plain(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert any(isinstance(m, MobileOneBlock) for m in model.modules())  # the model is untouched


def test_kept_bytes_counts_every_storage_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    # the convolution keeps x; the first ReLU's output is kept by both, the second's by itself
    assert kept_bytes(model, x) == 4 * (x.numel() + 2 * 2 * 4 * 25)


def test_peak_bytes_sees_what_lives_together():
    def step():
        first = torch.zeros(1000)
        del first
        return torch.zeros(1000) + torch.zeros(1000)

    assert 12000 <= peak_bytes(step, "cpu") < 14000


def test_collapsed_training_keeps_less_than_the_plain_net():
    # at few images small blocks keep their branches
    x = torch.randn(12, 3, 160, 160)
    kept = {name: kept_bytes(build_contender(name, "mobileone_s1", "cpu"), x) for name in EAGER}
    assert kept["ours"] < kept["plain"] < kept["timm"]
    big, small = (
        {
            name: kept_bytes(
                build_contender(name, "mobileone_s0", "cpu"), torch.randn(n, 3, 96, 96)
            )
            for name in EAGER
        }
        for n in (5, 3)
    )
    an_image = {name: (big[name] - small[name]) / 2 for name in EAGER}
    assert an_image["ours always"] < 0.6 * an_image["plain"] < 0.25 * an_image["timm"]


def test_the_report_holds_every_contender_and_is_saved(tmp_path):
    result = benchmark_training(
        ["mobileone_s0"], EAGER, batch_size=2, image_size=32, rounds=2, directory=tmp_path
    )
    assert [row.contender for row in result.costs] == EAGER
    assert all(row.seconds > 0 and row.kept > 0 and row.peak > 0 for row in result.costs)
    assert result.table().row_count == 4
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["costs"][1]["seconds"] == result.cost("mobileone_s0", "ours").seconds
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="was not measured"):
        result.cost("mobileone_s0", "plain compiled")


@pytest.mark.parametrize("name", EAGER)
def test_every_contender_takes_a_real_step(name):
    before = build_contender(name, "mobileone_s0", "cpu")
    after = build_contender(name, "mobileone_s0", "cpu")
    torch.testing.assert_close(before.state_dict(), after.state_dict())  # the same seed
    assert after.training
    from mobileone.bench.training import _training_step

    _training_step(after, torch.randn(2, 3, 32, 32))()
    changed = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(changed)


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match=r"'theirs'.*ours always"):
        build_contender("theirs", "mobileone_s0", "cpu")
    with pytest.raises(ValueError, match=r"'mobileone_mu0'.*mobileone_s4"):
        build_contender("timm", "mobileone_mu0", "cpu")
    with pytest.raises(ValueError, match=r"`rounds` \(=0\)"):
        benchmark_training(rounds=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            benchmark_training(device="cuda")
    assert set(EAGER) < set(CONTENDERS)
