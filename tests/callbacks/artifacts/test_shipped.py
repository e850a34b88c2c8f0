"""Whether a checkpoint alone rebuilds the network that ships."""

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from torch import nn

from callbacks.artifacts.shipped import (
    architecture,
    get_network,
    images_due,
    images_uint8,
    rebuilt,
)
from mobileone.export import ExportSpec


class Module(LightningModule):
    def __init__(self, model="mobileone_s0", model_kwargs=None):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(model, num_classes=2, **(model_kwargs or {}))

    @property
    def export_spec(self):
        return ExportSpec(
            self.hparams["model"], ("a", "b"), (3, 32, 32), (0.5,) * 3, (0.2,) * 3, "bicubic", 1
        )


def test_hyper_parameters_rebuild_a_network_and_nothing_random_is_drawn():
    module = Module("test_byobnet", {"drop_rate": 0.3})
    before = torch.get_rng_state()
    assert architecture(get_network(module)) == rebuilt(module)
    assert torch.equal(before, torch.get_rng_state())
    module.train()
    module.model.eval()(torch.zeros(1, 3, 32, 32))  # nothing that a pass leaves behind counts
    assert architecture(get_network(module)) == rebuilt(module)


def test_a_network_that_was_changed_is_not_that_of_its_name():
    module = Module("test_byobnet")
    module.model.head.drop = nn.Dropout(0.5)
    assert architecture(get_network(module)) != rebuilt(module)
    module.model = nn.Linear(2, 2)
    assert architecture(get_network(module)) != rebuilt(module)


@pytest.mark.parametrize(
    "sizes", [[32] * 11 + [8], [128], [64, 2], [32, 32, 8], [10, 10], [1] * 200, [256] * 9]
)
def test_64_images_are_kept_if_there_are_as_many_from_all_over_the_set(sizes):
    kept = 0
    spec = Module("test_byobnet").export_spec
    per_batch = []
    for index, size in enumerate(sizes):
        due = min(64 - kept, images_due(index, len(sizes), 64))
        found = images_uint8((torch.zeros(size, 3, 32, 32),), spec, due) if due else []
        kept += len(found)
        per_batch.append(len(found))
    assert kept == min(64, sum(sizes))
    if len(sizes) > 3:
        full = per_batch[:-1]
        assert max(full) - min(full) <= 1


def test_a_module_without_a_name_that_timm_knows_has_nothing_to_rebuild():
    module = Module("test_byobnet")
    module.hparams["model"] = "mine"
    assert rebuilt(module) is None
