"""The comparison that tests of resuming rest on sees what it should."""

import copy

import pytest
import torch

from tests.helpers.bitwise import differing


def checkpoint():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = model.state_dict()
    return {
        "state_dict": weights,
        "current_model_state": copy.deepcopy(weights),
        "optimizer_states": [copy.deepcopy(optimizer.state_dict())],
        "lr_schedulers": [],
        "global_step": 1,
        "epoch": 1,
    }


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda end: end["state_dict"]["bias"].zero_().neg_(), "state_dict/bias"),
        (lambda end: end["state_dict"].update(more=torch.ones(1)), "state_dict/more"),
        (lambda end: end["current_model_state"].pop("bias"), "current_model_state/bias"),
        (lambda end: end["optimizer_states"][0]["state"].pop(1), "optimizer/1/momentum_buffer"),
        (lambda end: end.update(epoch=2), "epoch"),
    ],
)
def test_every_difference_is_named(change, name):
    expected = checkpoint()
    expected["state_dict"]["bias"].zero_()
    found = copy.deepcopy(expected)
    assert differing(found, expected) == []
    change(found)  # the first turns the sign of zeros
    assert differing(found, expected) == [name]
