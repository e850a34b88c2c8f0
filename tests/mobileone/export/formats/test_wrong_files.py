"""Files of tensors and for devices that were written wrongly on purpose: each gate must say so."""

import copy
import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

import mobileone
from mobileone.export import FORMATS, Metadata
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import Reference
from mobileone.export.verify.structure import count_kinds, fused_kinds, structure_problems
from mobileone.io.optional_import import require
from tests.helpers.branches import Branches
from tests.helpers.mlpackage import digits, swap_channels
from tests.helpers.norms import randomize_bn
from tests.helpers.tiny import tiny_network, tiny_spec
from tests.helpers.variants import slow

TENSORS, DEVICES = ("torchscript", "torch_export", "onnx"), ("executorch", "litert", "coreai")
SPEC = tiny_spec()


@cache
def reference():
    network, images = tiny_network(), digits()
    logits = network(normalize(images, SPEC)).detach()
    return Reference(mobileone.reparameterize(network), {"logits": logits}, images)


def faults(name, network, path, spec=SPEC):
    """The names of the checks that a file fails, which was written of this network and spec."""
    row = FORMATS[name]
    try:
        require({name: row.needs}, "formats")
    except ImportError as error:
        pytest.skip(str(error))
    path = path / row.filename
    row.write(network, spec, path, Metadata())
    found = {key for key, p in row.compare(path, SPEC, reference()).items() if not p.accepted}
    expected = fused_kinds(reference().model, normalize(reference().images, SPEC))
    if structure_problems(count_kinds(row.operations(path)), expected):
        found.add("structure")
    return found


def changed_weight():
    """The largest weight of the depthwise layer, a fifth larger."""
    wrong = copy.deepcopy(reference().model)
    weight = [m for m in wrong.modules() if isinstance(m, nn.Conv2d)][1].weight
    weight.data.view(-1)[weight.abs().argmax()] *= 1.2
    return wrong


def permuted_classes():
    """The first two rows of the classifier, exchanged: as a permuted list of labels."""
    wrong = copy.deepcopy(reference().model)
    order = torch.tensor([1, 0, 2])
    wrong[4].weight.data, wrong[4].bias.data = wrong[4].weight[order], wrong[4].bias[order]
    return wrong


def unfused():
    wrong = copy.deepcopy(reference().model)
    wrong[0] = Branches(tiny_network()[0]).eval()
    return wrong


@pytest.mark.parametrize("name", TENSORS + DEVICES)
def test_the_good_one_passes_and_one_changed_weight_does_not(name, tmp_path):
    (tmp_path / "good").mkdir()
    assert faults(name, reference().model, tmp_path / "good") == set()
    assert "parity" in faults(name, changed_weight(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSORS + DEVICES)
@pytest.mark.parametrize("change", [lambda: swap_channels(reference().model), permuted_classes])
def test_swapped_channels_and_permuted_classes(name, change, tmp_path):
    assert "parity" in faults(name, change(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSORS + DEVICES)
def test_a_layer_left_unfused(name, tmp_path):
    assert faults(name, unfused(), tmp_path) == {"structure"}


class Scaling(nn.Module):
    """A norm as a converter may write it: constants for each of eight channels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 8, 1, 1) - 0.5)

    def forward(self, x):
        return x * self.scale + self.shift


def norm():
    return randomize_bn(nn.BatchNorm2d(8)).requires_grad_(False)


@pytest.mark.parametrize("name", ["coreai", *map(slow, (*TENSORS, "executorch", "litert"))])
@pytest.mark.parametrize("layer", [norm, Scaling])
def test_a_norm_that_no_convolution_takes_in(name, layer, tmp_path):
    """The padding of the convolution after it keeps it in the file, whole or decomposed."""
    wrong = copy.deepcopy(reference().model)
    assert "structure" in faults(
        name, nn.Sequential(wrong[0], layer(), *wrong[1:]).eval(), tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_wrong_normalization_inside(name, field, tmp_path):
    value = getattr(SPEC, field)
    wrong = dataclasses.replace(SPEC, **{field: (value[0] + 0.02, *value[1:])})
    assert faults(name, reference().model, tmp_path, wrong) & {"parity", "program_parity"}
