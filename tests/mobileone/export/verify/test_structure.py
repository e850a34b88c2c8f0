import pytest
import timm
import torch

import mobileone
from mobileone.export import FORMATS, Metadata
from mobileone.export.verify import structure
from mobileone.export.verify.structure import (
    count_kinds,
    fused_kinds,
    structure_problems,
    unfused_layers,
)
from tests.helpers.tiny import tiny_network, tiny_spec


def test_operations_are_known_by_every_formats_names():
    names = {
        "aten::_convolution": 1,
        "aten.conv2d.default": 1,
        "aten.convolution.default": 1,
        "Conv": 1,
        "conv": 1,
        "BatchNormalization": 1,
        "batch_norm": 1,
        "aten::batch_norm": 1,
        "aten._native_batch_norm_legit_no_training.default": 1,
        "add": 1,
        "Add": 1,
        "aten::add_": 1,
        "aten.add.Tensor": 1,
        "relu": 9,
        "addmm": 9,
        "aten::linear": 9,
        "layer_norm": 9,
        "sum": 9,  # LiteRT's pooling of a map of one place
    }
    assert count_kinds(names) == {"convolutions": 5, "norms": 4, "additions": 4}


@pytest.mark.parametrize(
    ("name", "convolutions"), [("mobileone_s0", 43), ("mobileone_s1", 43), ("mobileone_s4", 67)]
)
def test_a_fused_network_has_one_convolution_a_layer(name, convolutions):
    """43 layers (Table 2); S4 has two more in each of its twelve squeeze-and-excitations."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    fused = mobileone.reparameterize(model)
    images = torch.empty(1, 3, 32, 32, device="meta")
    counted = fused_kinds(fused, images)
    assert counted == {"convolutions": convolutions, "norms": 0, "additions": 0}
    assert unfused_layers(fused) == []
    assert len(unfused_layers(model)) == 43


def test_branches_are_seen(monkeypatch):
    model, images = tiny_network(), torch.randn(1, 3, 32, 48)
    assert fused_kinds(mobileone.reparameterize(model), images)["convolutions"] == 2
    branches = {"convolutions": 4, "norms": 3, "additions": 2}
    problems = structure_problems(branches, {"convolutions": 2, "norms": 0, "additions": 0})
    assert [p.split()[:2] for p in problems] == [
        ["4", "convolutions"],
        ["3", "norms"],
        ["2", "additions"],
    ]
    assert structure.structure_problems(branches, branches) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchscript", "torch_export", "coreml"])
def test_written_files_of_s4_have_its_squeeze_and_excitations(tmp_path, name):
    """43 layers, and two convolutions in each of twelve; nothing is added up."""
    pytest.importorskip({"coreml": "coremltools"}.get(name, "torch"))
    fused = mobileone.reparameterize(timm.create_model("mobileone_s4", num_classes=3).eval())
    row, spec = FORMATS[name], tiny_spec(3, (32, 32))
    row.write(fused, spec, tmp_path / row.filename, Metadata())
    written = count_kinds(row.operations(tmp_path / row.filename))
    assert written == {"convolutions": 43 + 2 * 12, "norms": 0, "additions": 0}
    assert structure_problems(written, fused_kinds(fused, torch.zeros(1, 3, 32, 32))) == []
