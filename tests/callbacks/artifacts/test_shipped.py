"""Whether a checkpoint alone rebuilds the network that ships."""

import timm
import torch
from lightning.pytorch import LightningModule
from torch import nn

from callbacks.artifacts.shipped import architecture, get_network, rebuilt
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


def test_a_module_without_a_name_that_timm_knows_has_nothing_to_rebuild():
    module = Module("test_byobnet")
    module.hparams["model"] = "mine"
    assert rebuilt(module) is None
