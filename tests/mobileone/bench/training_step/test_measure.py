"""The training benchmark: it measures what it names."""

import os
import signal
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from mobileone import MobileOneBlock
from mobileone.bench.show.charts import bar_figure
from mobileone.bench.show.tables import result_table
from mobileone.bench.training_step.implementations import (
    IMPLEMENTATIONS,
    build_implementation,
    change_of,
    plain_network,
    sample_images,
)
from mobileone.bench.training_step.measure import measure_training
from mobileone.bench.training_step.worker import (
    StepWorker,
    StepWorkerError,
    TrainingSetting,
    kept_bytes,
    peak_bytes,
    training_step,
)
from mobileone.folding import StridedPointwise

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
    kept = {
        name: kept_bytes(build_implementation(name, "mobileone_s1", "cpu"), x) for name in EAGER
    }
    assert kept["ours"] < kept["plain"] < kept["timm"]
    big, small = (
        {
            name: kept_bytes(
                build_implementation(name, "mobileone_s0", "cpu"), torch.randn(n, 3, 96, 96)
            )
            for name in EAGER
        }
        for n in (5, 3)
    )
    an_image = {name: (big[name] - small[name]) / 2 for name in EAGER}
    assert an_image["ours always"] < 0.6 * an_image["plain"] < 0.25 * an_image["timm"]


def test_the_result_holds_every_implementation_and_names_the_one_that_died(monkeypatch):
    from mobileone.bench.training_step import measure as training

    class Mortal(StepWorker):
        def __init__(self, model, implementation, setting):
            super().__init__(model, implementation, setting)
            self._name = implementation

        def step(self):
            if self._name == "ours":
                os.kill(self._process.pid, signal.SIGSEGV)
            taken = super().step()  # by a second slower for timm, however busy the machine is
            return replace(taken, seconds=taken.seconds + (self._name == "timm"))

    monkeypatch.setattr(training, "StepWorker", Mortal)
    result = measure_training(
        ["mobileone_s0"], ["ours", "timm", "plain"], batch_size=2, input_size=32, rounds=3,
        threads=1, channels_last=True, images="noise",
    )  # fmt: skip
    rows = {row["contender"]: row for row in result.rows}
    assert list(rows) == ["ours", "timm", "plain"]
    dead = rows.pop("ours")
    assert dead["failure"] == "its process ended by SIGSEGV" and "seconds" not in dead
    for row in rows.values():
        assert row["failure"] is None
        assert min(row["seconds"], row["cpu_seconds"], row["kept_mib"]) > 0
        assert row["peak_mib"] >= row["kept_mib"]
    assert rows["plain"]["to_plain"] == 1 == rows["timm"]["timm_to"]
    assert rows["timm"]["to_plain"] == rows["plain"]["timm_to"] > 1
    assert "oneDNN" in rows["timm"]["change"] and rows["plain"]["change"] is None
    # the child measured the network that it names
    model = build_implementation("plain", "mobileone_s0", "cpu", channels_last=True)
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    assert rows["plain"]["kept_mib"] == pytest.approx(kept_bytes(model, images) / 2 / 2**20)
    table = result_table(result)
    assert table.row_count == 2
    assert "mobileone_s0, ours: its process ended by SIGSEGV" in table.caption
    assert "image_size 32" in table.title and "channels_last True" in table.title
    texts = [text.get_text() for axes in bar_figure(result).axes for text in axes.texts]
    assert texts.count("failed") == 2


def test_photographs_are_smooth_and_noise_is_not():
    photos, noise = (sample_images(kind, 4, 64) for kind in ("photos", "noise"))
    for images, low, high in ((photos, 0.8, 1), (noise, -0.05, 0.05)):
        assert images.shape == (4, 3, 64, 64)
        pairs = torch.stack((images[..., 1:].flatten(), images[..., :-1].flatten()))
        assert low < torch.corrcoef(pairs)[0, 1] < high
        assert 0.5 < images.std() < 2
        assert not torch.equal(images[0], images[2])
    assert torch.equal(sample_images("photos", 2, 64), photos[:2])


def test_timms_stem_is_made_safe_where_it_would_die_and_the_result_says_so():
    for name, channels_last, changed in (
        ("timm", True, True),
        ("timm", False, False),
        ("timm compiled", False, True),
        ("ours", True, False),
    ):
        model = build_implementation(name, "mobileone_s0", "cpu", channels_last)
        kernel = model.stem.conv_kxk[0].conv.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert (change_of(name, "cpu", channels_last) is not None) == changed
        if changed:
            assert isinstance(model.stem.conv_scale.conv, StridedPointwise)
        elif name == "timm":
            assert type(model.stem.conv_scale.conv) is nn.Conv2d
        assert change_of(name, "cuda", channels_last) is None


def test_an_error_in_the_process_is_told_and_one_that_hangs_is_ended():
    worker = StepWorker("mobileone_s0", "plain", TrainingSetting(1, 32, images="noise"))
    try:  # one value a channel in the last layers
        with pytest.raises(StepWorkerError, match="ValueError: Expected more than 1 value"):
            worker.prepare()
        worker.limit = 0.2
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(StepWorkerError, match=r"no answer to 'prepare' in 0\.2 seconds"):
            worker.prepare()
    finally:
        worker.close()
    assert not worker._process.is_alive()


def test_training_under_autocast_keeps_less():
    x = torch.randn(8, 3, 96, 96)
    model = build_implementation("plain", "mobileone_s0", "cpu")
    before = [p.clone() for p in model.parameters()]
    training_step(model, x, "bfloat16")()
    assert not all(map(torch.equal, before, model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        halved = kept_bytes(model, x)
    assert halved < 0.8 * kept_bytes(model, x)


@pytest.mark.parametrize("name", EAGER)
def test_every_contender_takes_a_real_step(name):
    before = build_implementation(name, "mobileone_s0", "cpu")
    after = build_implementation(name, "mobileone_s0", "cpu")
    torch.testing.assert_close(before.state_dict(), after.state_dict())  # the same seed
    assert after.training
    training_step(after, torch.randn(2, 3, 32, 32))()
    changed = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(changed)


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match=r"'theirs'.*ours always"):
        build_implementation("theirs", "mobileone_s0", "cpu")
    with pytest.raises(ValueError, match=r"'mobileone_mu0'.*mobileone_s4"):
        build_implementation("timm", "mobileone_mu0", "cpu")
    with pytest.raises(ValueError, match=r"`rounds` \(=0\)"):
        measure_training(rounds=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"`device` \(='cuda'\) is not on this machine"):
            measure_training(device="cuda")
    with pytest.raises(ValueError, match=r"`images` \(='cats'\) must be one of photos, noise"):
        measure_training(images="cats")
    with pytest.raises(ValueError, match=r"'mps'.*cpu or cuda"):
        measure_training(device="mps")
    with pytest.raises(ValueError, match=r"`threads` \(=4096\)"):
        measure_training(threads=4096)
    with pytest.raises(ValueError, match=r"'repvgg_a0'\) is not one of timm's MobileOnes"):
        measure_training(["repvgg_a0"])
    assert set(EAGER) < set(IMPLEMENTATIONS)
