"""Counts of parameters, multiply-adds, activations and traffic, against arithmetic by hand."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from mobileone.bench.inference.profile import memory_traffic, profile_models, profile_module
from mobileone.bench.show.tables import result_table


class Small(nn.Module):
    """A convolution, its norm and activation, two heads that share weights, an odd operation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.heads = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.heads[1].weight = self.heads[0].weight

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return torch.erf(self.heads(x.mean((2, 3))))


def levels(rows, column):
    return {
        level: sum(row.get(column, 0) for row in rows if row["level"] == level)
        for level in ("model", "stage", "layer")
    }


def test_a_small_network_by_hand():
    rows = profile_module("small", Small().eval(), input_size=6)
    total, *parts = rows
    assert total["parameters_train"] == 3 * 8 * 9 + 2 * 8 + 8 * 8 + 2 * 8
    assert total["parameters"] == 3 * 8 * 9 + 8 + 8 * 8 + 2 * 8  # the norm became a bias
    assert total["macs"] == 3 * 8 * 9 * 4 * 4 + 2 * 8 * 8
    assert total["activations"] == 8 * 16 + 2 * 8
    assert "aten::erf ×1" in total["uncounted"] and "aten::mean ×1" in total["uncounted"]
    assert [r["name"] for r in parts if r["level"] == "stage"] == [
        "(model)", "conv", "norm", "act", "heads.0", "heads.1",
    ]  # fmt: skip
    assert "paper_mmacs" not in total
    conv = next(r for r in parts if r["level"] == "layer" and r["name"] == "conv")
    assert conv["traffic_bytes"] == 4 * (3 * 36 + 3 * 8 * 9 + 8 + 8 * 16)


@pytest.mark.parametrize("column", ["parameters", "macs", "activations", "traffic_bytes"])
def test_stages_and_layers_add_up_to_the_model(column):
    for name in ("mobileone_mu0", "mobilenetv2_100"):
        assert len(set(levels(profile_models([name], 64).rows, column).values())) == 1


def test_the_family_has_the_papers_counts():
    # deployed parameters and MACs as mmpretrain's metafile has them, plus the pooling that it
    # does not count (512 k: one addition an element)
    published = {"mobileone_s0": (2_078_504, 274.1e6), "mobileone_s1": (4_764_840, 823.8e6)}
    result = profile_models(list(published))
    rows = {row["model"]: row for row in result.rows if row["level"] == "model"}
    for name, (parameters, macs) in published.items():
        assert rows[name]["parameters"] == parameters
        assert rows[name]["macs"] == pytest.approx(macs, rel=0.005)
        assert abs(rows[name]["params_difference"]) < 1.1  # the paper rounds to 0.1 M
        assert abs(rows[name]["macs_difference"]) < 0.1
        train = timm.create_model(name)
        assert rows[name]["parameters_train"] == sum(p.numel() for p in train.parameters())
    for level in ("model", "stage", "layer"):
        shown = replace(result, protocol=result.protocol | {"shown": level})
        assert result_table(shown).row_count == sum(row["level"] == level for row in result.rows)


def test_attention_is_counted():
    (row,) = (r for r in profile_models(["deit_tiny_patch16_224"]).rows if r["level"] == "model")
    tokens, dim, depth = 197, 192, 12
    layer = tokens * dim * dim * 12 + 2 * tokens * tokens * dim
    norms = (2 * depth + 1) * 2 * tokens * dim  # fvcore counts two an element
    assert row["macs"] == pytest.approx(
        depth * layer + 196 * 768 * dim + dim * 1000 + norms, rel=0.01
    )


def test_traffic_leaves_views_out_and_counts_in_place_twice():
    class Net(nn.Module):
        def forward(self, x):
            return x.view(-1).relu_()

    assert memory_traffic(Net(), torch.zeros(2, 3, 4, 5)) == {"": 2 * 120 * 4}
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    assert memory_traffic(model, torch.zeros(1, 1, 5, 5)) == {
        "0": 4 * (25 + 2 + 2 + 50), "1": 4 * (50 + 50),
    }  # fmt: skip
    assert not model[0]._forward_hooks
