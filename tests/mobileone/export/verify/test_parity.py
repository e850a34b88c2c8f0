import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mobileone.export.formats.table import Format
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import (
    NotVerifiedError,
    Reference,
    compare,
    fixed_images,
    measure,
    recovered_logits,
)
from tests.helpers.tiny import tiny_network, tiny_spec


def test_the_largest_relative_error_over_the_images():
    reference = torch.tensor([[1.0, -4.0], [10.0, 2.0]])
    candidate = torch.tensor([[1.0, -3.0], [10.0, 3.0]])
    parity = compare(reference, candidate, "logits")
    assert parity.max_relative_error == pytest.approx(max(1 / 4, 1 / 10))
    assert (parity.status, parity.top1_agreement, parity.images) == ("measured", 1.0, 2)


class Counting(nn.Module):
    """A classifier that counts its passes in float64."""

    passes = 0

    def __init__(self):
        super().__init__()
        self.network = tiny_network()

    def forward(self, x):
        Counting.passes += x.dtype == torch.float64
        return self.network(x)


def test_the_rounding_of_float32_is_measured_once_for_all_files():
    """Also for a format that is compared on fewer images."""
    model, spec = Counting().eval(), tiny_spec()
    images = fixed_images(spec, 20)
    logits = model(normalize(images, spec)).detach()
    checked = Reference(model, {"logits": logits}, images)
    for most in (None, 8):
        row = Format(
            "x",
            write=lambda *_: None,
            runner=lambda path, spec: lambda images: model(normalize(images, spec)).detach(),
            program_tolerance=1e-5,
            most_images=most,
        )
        assert row.compare(Path("x"), spec, checked)["program_parity"].tolerance >= 1e-5
    assert Counting.passes == 1


def test_top1_agreement_counts_images():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert compare(reference, reference.flip(1), "logits").top1_agreement == 0
    candidate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert compare(reference, candidate, "logits").top1_agreement == 0.75


@pytest.mark.parametrize("tolerance", [None, 0.1, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["file", "network"])
def test_answers_that_are_not_finite_are_neither_measured_nor_accepted(whose, value, tolerance):
    good, bad = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [1.0, value], [value, value]])
    pair = (good, bad) if whose == "file" else (bad, good)
    parity = compare(*pair, "logits", tolerance)
    assert parity.status == "not finite"
    assert not parity.accepted
    assert parity.max_relative_error is None and parity.top1_agreement is None
    assert parity.problem() == f"the {whose} gives 2 of 3 images logits that are not finite"


def test_a_clear_class_must_stay_and_a_tie_may_change():
    """Within the error that is accepted, so that the classes alone decide."""
    reference = torch.tensor([[2.0, 0.0, -9.0], [0.05, 0.0, -9.0], [5.0, 4.9, -9.0]])
    tied, clear = reference.clone(), reference.clone()
    tied[1:, 0] -= 0.2
    clear[0, 1] = 2.1
    accepted = compare(reference, tied, "logits", tolerance=0.5)
    assert accepted.accepted and accepted.problem() is None
    assert (accepted.clear_images, accepted.clear_changed) == (1, 0)
    assert accepted.top1_agreement == pytest.approx(1 / 3)
    rejected = compare(reference, clear, "logits", tolerance=0.5)
    assert not rejected.accepted
    assert rejected.problem() == (
        "another class than the network's for 1 of the 1 images whose class is clear"
    )
    as_table = compare(reference.softmax(1), clear.softmax(1), "probabilities", tolerance=2)
    assert (as_table.clear_images, as_table.clear_changed) == (1, 1)
    assert not as_table.accepted


def test_a_margin_of_a_tenth_is_clear():
    for margin, clear in ((0.09, 0), (0.11, 1)):
        table = torch.tensor([[(1 + margin) / 2, (1 - margin) / 2]])
        assert compare(table.log(), table.log(), "logits").clear_images == clear
    assert compare(torch.ones(2, 1), torch.ones(2, 1), "logits").clear_images == 0


def test_fewer_images_are_taken_evenly_with_their_outputs():
    images = torch.arange(64)
    whole = Reference(torch.nn.Identity(), {"logits": images[:, None]}, images)
    few = whole.at_most(8)
    assert few.images.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert few.logits[:, 0].tolist() == few.images.tolist()
    assert len(whole.at_most(60).images) == 32 and len(whole.at_most(None).images) == 64


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="returned"):
        compare(torch.ones(2, 3), torch.ones(2, 1), "logits")


def test_what_cannot_run_is_not_verified_and_has_no_figures():
    def cannot():
        raise NotVerifiedError("no runtime")

    parity = measure(cannot)
    assert parity.to_dict() == {"status": "not verified", "reason": "no runtime"}
    assert parity.accepted


@pytest.mark.parametrize(
    ("error", "accepted"), [(0.0, True), (0.09, True), (0.11, False), (math.nan, False)]
)
def test_above_the_tolerance_and_not_a_number_are_not_accepted(error, accepted):
    parity = compare(torch.ones(1, 2), torch.ones(1, 2) + error, "logits", 0.1)
    assert parity.accepted == accepted


def test_the_images_are_fixed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first, second = fixed_images(tiny_spec(4)), fixed_images(tiny_spec(4))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert first.shape == (8, 4, 32, 48)
    assert first.dtype == torch.uint8
    assert int(first.max()) > 230 and int(first.min()) < 25


def test_probabilities_show_the_logits_that_they_were_made_of():
    """Up to the shift of an image and the classes that float32 rounds to 0."""
    logits = torch.tensor([[3.0, -2.0, 40.0, -90.0], [1e5, 1e5 - 2.5, 0.0, -1e5]])
    found = recovered_logits((logits + 7).softmax(1), logits)
    assert compare(logits, found, "logits").max_relative_error < 1e-7
    for column, wrong in ((1, 0.0), (3, 1e-3), (0, float("nan"))):  # lost, invented, not a number
        probabilities = logits.softmax(1)
        probabilities[0, column] = wrong
        parity = compare(logits, recovered_logits(probabilities, logits), "logits", 1e-3)
        assert not parity.accepted


@pytest.mark.parametrize(("weight_error", "accepted"), [(0.0, True), (1e-5, False)])
def test_a_file_may_err_as_far_as_float32_does(weight_error, accepted):
    """A network whose logits are small differences of large numbers, against its exact values."""
    torch.manual_seed(0)
    spec = tiny_spec()
    size = math.prod(spec.input_size)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, 3, bias=False)).eval()
    with torch.no_grad():
        weight = model[1].weight.copy_(1e3 * torch.randn(3, size))
        weight[:, -1] = 0  # its pixel is constant
    images = fixed_images(spec)
    pixels = normalize(images, spec).flatten(1)

    with torch.no_grad():  # what remains of the logits is small
        solved = torch.linalg.lstsq(pixels.double(), pixels.double() @ weight.double().T - 1e-2)
        weight -= solved.solution.T.float()

    def runner(path, spec):
        wrong = weight.detach().double() * (1 + weight_error)
        wrong[0] += weight_error * 1e3
        return lambda images: (normalize(images, spec).flatten(1).double() @ wrong.T).float()

    logits = model(normalize(images, spec)).detach()
    row = Format("x", lambda *_: None, runner, program_tolerance=1e-5)
    parity = row.compare(Path(), spec, Reference(model, {"logits": logits}, images))
    assert parity["program_parity"].max_relative_error > 1e-5
    assert parity["program_parity"].accepted == accepted, parity
