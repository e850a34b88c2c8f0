"""Files of every format that were written wrongly on purpose: the gates must say so."""

import copy
import dataclasses
import zipfile
from functools import cache

import pytest
import torch
from torch import nn

import mobileone
from mobileone.export import FORMATS, Metadata, RejectedError, export_model, load_runner
from mobileone.export.formats import litert
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import Reference
from mobileone.export.verify.structure import count_kinds, fused_kinds, structure_problems
from tests.helpers.branches import Branches
from tests.helpers.formats import OF_FLOATS, skip_without_packages
from tests.helpers.mlpackage import digits, swap_channels
from tests.helpers.norms import randomize_bn
from tests.helpers.tiny import tiny_network, tiny_spec
from tests.helpers.variants import slow_where

SPEC = tiny_spec()
# of which check may say so, where the numbers are not the network's
NUMBERS = {"parity", "program_parity", "weights_parity"}


@cache
def reference():
    network, images = tiny_network(), digits()
    logits = network(normalize(images, SPEC)).detach()
    return Reference(mobileone.reparameterize(network), {"logits": logits}, images)


def faults(name, network, path, spec=SPEC, own=SPEC):
    """The names of the checks that a file fails, which was written of this network and spec."""
    skip_without_packages(name)
    row = FORMATS[name]
    path = path / row.filename
    row.write(network, spec, path, Metadata())
    found = {key for key, p in row.compare(path, own, reference()).items() if not p.accepted}
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


@pytest.mark.parametrize("name", OF_FLOATS)
def test_the_good_one_passes_and_one_changed_weight_does_not(name, tmp_path):
    (tmp_path / "good").mkdir()
    assert faults(name, reference().model, tmp_path / "good") == set()
    assert NUMBERS & faults(name, changed_weight(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FLOATS)
@pytest.mark.parametrize("change", [lambda: swap_channels(reference().model), permuted_classes])
def test_swapped_channels_and_permuted_classes(name, change, tmp_path):
    assert NUMBERS & faults(name, change(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FLOATS)
def test_a_layer_left_unfused(name, tmp_path):
    """Its function is the same."""
    found = faults(name, unfused(), tmp_path)
    assert "structure" in found and "parity" not in found


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


@pytest.mark.parametrize("name", slow_where("coreai".__ne__, OF_FLOATS))
@pytest.mark.parametrize("layer", [norm, Scaling])
def test_a_norm_that_no_convolution_takes_in(name, layer, tmp_path):
    """The padding of the convolution after it keeps it in the file, whole or decomposed."""
    wrong = copy.deepcopy(reference().model)
    assert "structure" in faults(
        name, nn.Sequential(wrong[0], layer(), *wrong[1:]).eval(), tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FLOATS)
@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_wrong_normalization_inside(name, field, tmp_path):
    own, value = dataclasses.replace(SPEC, pixels=True), getattr(SPEC, field)
    wrong = dataclasses.replace(own, **{field: (value[0] + 0.02, *value[1:])})
    assert NUMBERS & faults(name, reference().model, tmp_path, wrong, own)


@pytest.mark.parametrize("name", slow_where("torchscript".__ne__, OF_FLOATS))
def test_a_permuted_label_list_in_the_file(name, tmp_path):
    """In its own words, which an app or `predict` goes by; the numbers are the network's."""
    skip_without_packages(name)
    row, permuted = FORMATS[name], dataclasses.replace(SPEC, class_names=("b", "a", "c"))

    def write(model, spec, path, metadata):
        return row.write(model, permuted, path, metadata)

    table = {name: dataclasses.replace(row, write=write)}
    with pytest.raises(
        RejectedError, match=r"the network has `class_names` 'a', and .* itself 'b'"
    ):
        export_model(tiny_network(), SPEC, tmp_path / "artifact", [name], table=table)


def test_labels_for_apps_that_differ_from_the_spec_next_to_them(tmp_path):
    """Both follow a `.tflite` as a zip archive."""
    path, permuted = tmp_path / "m.tflite", dataclasses.replace(SPEC, class_names=("b", "a", "c"))
    path.write_bytes(litert.finished(b"TFL3", SPEC))
    assert litert.spec(path) == SPEC
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as files:
        files.writestr("spec.json", SPEC.to_json())
        files.writestr("labels.txt", "\n".join(permuted.class_names))
    changed = (tmp_path / "labels.zip").rename(path)
    with pytest.raises(ValueError, match=r"labels\.txt in m\.tflite has other class names"):
        litert.spec(changed)
    with pytest.raises(ValueError, match="other class names than its"):
        load_runner(changed)
