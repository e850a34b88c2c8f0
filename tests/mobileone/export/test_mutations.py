"""MobileOne-S0 itself, written wrongly on purpose: the gates must publish none of it.

Each mutation is handed to `export_model` as the file that was written; those that a network of two
blocks shows as well are in `verify/test_mlprogram.py`.
"""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import mobileone
from mobileone.export import FORMATS, ExportSpec, Metadata, RejectedError, export_model
from mobileone.export.formats import coreml
from mobileone.export.preprocess import normalize
from tests.helpers.branches import Branches
from tests.helpers.mlpackage import digits, perturb_weight

pytest.importorskip("coremltools")
pytestmark = pytest.mark.slow

NAMES = tuple("abcdefghij")
SPEC = ExportSpec(
    "mobileone_s0",
    NAMES,
    (3, 32, 48),
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    "bilinear",
    1.0,
)


@pytest.fixture(scope="module")
def network():
    """Fresh, on the statistics of the images, with a head that tells bright ones from dark ones.

    The head is solved for, not trained: the first steps of a training are chaotic, and half
    precision is good enough for only some of the networks that they lead to.
    """
    torch.manual_seed(0)
    model = timm.create_model("mobileone_s0", num_classes=len(NAMES)).train()
    images = digits(128)
    inputs, classes = normalize(images, SPEC), images[:, 1].float().mean((1, 2)).argsort().argsort()
    classes = classes * len(NAMES) // len(images)  # by the brightness of the second channel
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for x in inputs.split(64):
            model(x)
        features = model.eval().forward_head(model.forward_features(inputs), pre_logits=True)
        centered = (features - features.mean(0)).double()
        wanted = F.one_hot(classes, len(NAMES)).double() * 10
        gram = centered @ centered.T + 10 * centered.square().sum(1).mean() * torch.eye(128)
        weight = (centered.T @ torch.linalg.solve(gram, wanted - wanted.mean(0))).T
        model.head.fc.weight.copy_(weight)
        model.head.fc.bias.copy_(wanted.mean(0) - weight @ features.mean(0).double())
    return model


@pytest.fixture(scope="module")
def fused(network):
    return mobileone.reparameterize(network)


@pytest.fixture(scope="module")
def good(fused, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.mlpackage"
    interface = coreml.write(fused, SPEC, path, Metadata())
    return path, interface


@pytest.fixture
def copied(good, tmp_path):
    return Path(shutil.copytree(good[0], tmp_path / "mutated.mlpackage"))


@pytest.fixture
def publish(network, good, tmp_path, monkeypatch):
    """Run the export with a package in place of the one that would be written."""

    def run(package):
        def write(model, spec, path, metadata):
            shutil.copytree(package, path)
            return good[1]

        row = dataclasses.replace(FORMATS["coreml"], write=write)
        monkeypatch.setitem(FORMATS, "coreml", row)
        images = digits(6)
        return export_model(network, SPEC, tmp_path / "artifact", ["coreml"], images=images)

    return run


def test_the_good_one_is_published(good, publish):
    manifest = publish(good[0])
    entry = manifest.formats["coreml"]
    assert entry["program_parity"]["max_relative_error"] < 5e-5
    assert entry["weights_parity"]["max_relative_error"] == 0
    assert entry["operations"]["conv"] == 43
    assert "batch_norm" not in entry["operations"] and "add" not in entry["operations"]


@pytest.mark.parametrize("what", ["largest", "median", "bias"])
@pytest.mark.parametrize("layer", [0, 20, 42])
def test_one_perturbed_number(copied, fused, publish, layer, what):
    """Of two million, in half precision: 1 % larger."""
    convs = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    tensor = convs[layer].bias if what == "bias" else convs[layer].weight
    which = -1 if what == "largest" else tensor.numel() // 2
    perturb_weight(copied, tensor, which, 1.01)
    with pytest.raises(RejectedError, match="coreml: weights parity"):
        publish(copied)
    assert not (copied.parent / "artifact").exists()
    assert (copied.parent / "artifact.rejected" / "manifest.json").is_file()


@pytest.mark.parametrize("layer", ["stem", "stages.3.1"])
def test_a_layer_left_unfused(network, fused, publish, tmp_path, layer):
    partly = copy.deepcopy(fused)
    partly.set_submodule(layer, Branches(network.get_submodule(layer)).eval())
    coreml.write(partly, SPEC, tmp_path / "m.mlpackage", Metadata())
    with pytest.raises(RejectedError, match=r"coreml: \d+ convolutions where .* has 43"):
        publish(tmp_path / "m.mlpackage")
