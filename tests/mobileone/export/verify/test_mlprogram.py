"""The reference evaluator of ML programs, and what it catches."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mobileone
from mobileone.export import FORMATS, Metadata
from mobileone.export.formats import coreml
from mobileone.export.preprocess import normalize
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.mlprogram_ops import KERNELS
from mobileone.export.verify.parity import NotVerifiedError, Reference
from mobileone.export.verify.structure import count_kinds, fused_kinds, structure_problems
from tests.helpers.branches import Branches
from tests.helpers.mlpackage import (
    declare_bgr,
    digits,
    edit,
    permute_labels,
    perturb_weight,
    swap_channels,
)
from tests.helpers.tiny import tiny_network, tiny_spec

pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(scope="module")
def reference(network):
    images = digits()
    logits = network(normalize(images, tiny_spec())).detach()
    return Reference(mobileone.reparameterize(network), {"logits": logits}, images)


@pytest.fixture(scope="module")
def package(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.mlpackage"
    coreml.write(reference.model, tiny_spec(), path, Metadata())
    return path


@pytest.fixture
def copied(package, tmp_path):
    return Path(shutil.copytree(package, tmp_path / "model.mlpackage"))


def faults(path, spec, reference, name="coreml"):
    """The names of the checks that a package fails."""
    row = FORMATS[name]
    found = {key for key, parity in row.check(path, spec, reference).items() if not parity.accepted}
    expected = fused_kinds(reference.model, normalize(reference.images, spec))
    if structure_problems(count_kinds(row.operations(path)), expected):
        found.add("structure")
    return found


# -- What it answers -------------------------------------------------------------------------


def test_a_good_package_is_the_network(package, reference):
    assert faults(package, tiny_spec(), reference) == set()
    checks = FORMATS["coreml"].check(package, tiny_spec(), reference)
    assert checks["program_parity"].max_relative_error < 1e-5
    assert 1e-6 < checks["parity"].max_relative_error < 1e-2  # half precision shows
    assert checks["parity"].top1_agreement == 1
    assert checks["program_parity"].images == len(reference.images) + 2


def test_the_answers_are_those_of_arithmetic_written_again(package, network):
    """Weights from the checkpoint's branches, in numpy's half precision between operations."""
    spec, images = tiny_spec(), digits(2)
    answer = MLProgram(package).predict(images)
    x = images.numpy().astype(np.float16)
    mean = (255 * np.array(spec.mean, np.float32)).astype(np.float16).reshape(-1, 1, 1)
    scale = (1 / (255 * np.array(spec.std, np.float32))).astype(np.float16).reshape(-1, 1, 1)
    x = ((x - mean) * scale).astype(np.float32)
    fused = mobileone.reparameterize(network).half().float()

    def half(tensor):
        return tensor.half().float()

    with torch.no_grad():
        y = torch.from_numpy(x)
        for block in fused[:2]:
            y = half(block(y))
        logits = half(fused[4](half(y.mean((2, 3)))))
    assert torch.allclose(answer.logits, logits, rtol=2e-3, atol=2e-3)
    assert torch.allclose(answer.probabilities, logits.softmax(1), atol=2e-3)
    assert torch.equal(answer.probabilities.argmax(1), logits.argmax(1))
    assert answer.classes == spec.class_names


def test_a_gray_program_and_one_of_four_channels(tmp_path):
    for channels in (1, 4):
        spec, model = tiny_spec(channels), tiny_network(channels)
        images = torch.randint(0, 256, (3, channels, 32, 48), dtype=torch.uint8)
        logits = model(normalize(images, spec)).detach()
        reference = Reference(mobileone.reparameterize(model), {"logits": logits}, images)
        path = tmp_path / f"{channels}.mlpackage"
        coreml.write(reference.model, spec, path, Metadata())
        assert faults(path, spec, reference) == set()


def test_images_of_another_size_are_refused(package):
    with pytest.raises(ValueError, match=r"images of \(3, 32, 48\), not \(3, 48, 32\)"):
        MLProgram(package).predict(digits(1, (48, 32)))


# -- What it catches -------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_wrong_normalization(reference, tmp_path, field):
    import dataclasses

    value = getattr(tiny_spec(), field)
    wrong = dataclasses.replace(tiny_spec(), **{field: (value[0] + 0.01, *value[1:])})
    coreml.write(reference.model, wrong, tmp_path / "m.mlpackage", Metadata())
    assert "program_parity" in faults(tmp_path / "m.mlpackage", tiny_spec(), reference)


def test_rgb_declared_as_bgr(copied, reference):
    edit(copied, declare_bgr)
    assert faults(copied, tiny_spec(), reference) == {"parity", "program_parity"}
    images = reference.images[:, :1].expand(-1, 3, -1, -1)
    logits = reference.model(normalize(images, tiny_spec())).detach()
    gray = Reference(reference.model, {"logits": logits}, images)
    assert faults(copied, tiny_spec(), gray) == {"program_parity"}  # gray data do not hide it


def test_swapped_channels(reference, tmp_path):
    wrong = swap_channels(reference.model)
    coreml.write(wrong, tiny_spec(), tmp_path / "m.mlpackage", Metadata())
    assert faults(tmp_path / "m.mlpackage", tiny_spec(), reference) >= {
        "program_parity",
        "weights_parity",
    }


def test_a_permuted_label_list(copied, reference):
    edit(copied, permute_labels)
    assert faults(copied, tiny_spec(), reference) == {"parity", "program_parity"}


def test_labels_of_other_classes_are_an_error(package, reference):
    with pytest.raises(ValueError, match="not the model's classes"):
        faults(package, tiny_spec(names=("a", "b", "z")), reference)


@pytest.mark.parametrize("layer", ["first", "depthwise", "classifier"])
def test_one_perturbed_weight(copied, reference, layer):
    """In the weight file itself: one half-precision number, 2 % larger.

    The first layer's changes no answer here: its channel's ReLU is never open.
    """
    parameters = {"first": "0", "depthwise": "1", "classifier": "4"}
    module = reference.model[int(parameters[layer])]
    weight = next(p for p in module.parameters() if p.ndim > 1)
    perturb_weight(copied, weight, -1, 1.02)
    assert "weights_parity" in faults(copied, tiny_spec(), reference)


def test_a_layer_left_unfused(network, reference, tmp_path):
    partly = copy.deepcopy(reference.model)
    partly[0] = Branches(network[0]).eval()
    coreml.write(partly, tiny_spec(), tmp_path / "m.mlpackage", Metadata())
    found = faults(tmp_path / "m.mlpackage", tiny_spec(), reference)
    assert "structure" in found
    assert "parity" not in found  # the function is the same


# -- Integers ----------------------------------------------------------------------------------


def test_quantize_rounds_ties_to_even_and_stops_at_the_ends():
    x = torch.tensor([[-200.0, -1.25, 0.25, 0.75], [1.0, 1.5, 64.0, 1e6]])
    codes = KERNELS["quantize"](x, 0.5, "int8", 3)
    # -400, -2.5, 0.5, 1.5; 2, 3, 128, 2e6, and 3 more, where a tie becomes even first
    assert codes.tolist() == [[-128, 1, 3, 5], [5, 6, 127, 127]]
    assert KERNELS["quantize"](x, 0.5, "uint8").tolist() == [[0, 0, 0, 2], [2, 3, 128, 255]]
    scales, zeros = torch.tensor([0.5, 2.0]), torch.tensor([1, 0])
    rows = KERNELS["quantize"](x, scales, "int8", zeros, 0)
    assert rows.tolist() == [[-128, -1, 1, 3], [0, 1, 32, 127]]
    back = KERNELS["dequantize"](rows, scales, zeros, 0)
    assert back.tolist() == [[-64.5, -1, 0, 1], [0, 2, 64, 254]]
    with pytest.raises(NotImplementedError, match="int4"):
        KERNELS["quantize"](x, 0.5, "int4")


def test_scales_of_blocks_are_repeated_along_each_axis():
    data, scale = torch.arange(8).reshape(2, 4), torch.tensor([[1.0, 10.0]])
    dense = KERNELS["constexpr_blockwise_shift_scale"](data, scale, torch.tensor([[1, 2]]))
    assert dense.tolist() == [[-1, 0, 0, 10], [3, 4, 40, 50]]


def test_a_table_of_ios18_is_looked_up():
    table = torch.tensor([-7, 0, 5, 100]).view(1, 1, 4, 1)
    dense = KERNELS["constexpr_lut_to_dense"](torch.tensor([[3, 0, 2], [1, 1, 3]]), table)
    assert dense.tolist() == [[100, -7, 5], [0, 0, 100]]
    with pytest.raises(NotImplementedError, match="tables of the shape"):
        KERNELS["constexpr_lut_to_dense"](torch.tensor([[1], [0]]), table.view(2, 1, 2, 1))


# -- What it does not know -------------------------------------------------------------------


def test_an_unknown_operation_is_not_verified_and_never_passed(package, reference, monkeypatch):
    monkeypatch.delitem(KERNELS, "relu")
    checks = FORMATS["coreml"].check(package, tiny_spec(), reference)
    for parity in (checks["parity"], checks["program_parity"]):
        assert parity.status == "not verified"
        assert "does not know the operation `relu`" in parity.reason
        assert parity.max_relative_error is None


def test_an_unknown_argument_is_not_verified(package, monkeypatch):
    monkeypatch.setitem(KERNELS, "relu", lambda x, leak: x)
    with pytest.raises(NotVerifiedError, match="`relu` with"):
        MLProgram(package).predict(digits(1))
    with pytest.raises(NotImplementedError, match="same"):
        KERNELS["conv"](torch.ones(1), torch.ones(1), [1], "same", [0], [1], 1)
