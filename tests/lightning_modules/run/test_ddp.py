"""Two processes train as one does on the joint batch."""

import pytest
import timm
import torch

from lightning_modules.run.trainer import TimmSyncBatchNorm
from tests.helpers.processes import run_program


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_mu0", "test_byobnet"])
def test_gradients_and_averages_are_those_of_the_joint_batch(name, make_folder, tmp_path):
    root = make_folder({"train": {"a": 12, "b": 12}, "val": {"a": 3, "b": 2}})
    for devices in ("1", "2"):
        run_program("train_on_ranks.py", name, root, tmp_path, devices)
    alone, first, second = (
        torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("1-0", "2-0", "2-1")
    )
    assert len(alone["gradients"]) == len(first["gradients"]) == 6
    scale = max(g.abs().max() for g in alone["gradients"][0].values())
    for step, expected in enumerate(alone["gradients"][:2]):
        for key, gradient in expected.items():
            error = (first["gradients"][step][key] - gradient).abs().max() / scale
            assert error < 1e-9, (step, key)
    for part in ("gradients", "weights", "average"):  # the same bits on both ranks
        pairs = zip(_flat(first[part]), _flat(second[part]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part
    for key, value in alone["average"].items():  # kept in float32
        torch.testing.assert_close(first["average"][key], value, rtol=1e-4, atol=1e-6)


def _flat(part):
    return [v for step in (part if isinstance(part, list) else [part]) for v in step.values()]


def test_the_conversion_keeps_the_activation_inside_a_norm():
    model = timm.create_model("test_byobnet")
    before = [
        type(m.act) for m in model.modules() if hasattr(m, "running_mean") and hasattr(m, "act")
    ]
    assert any(act is not torch.nn.Identity for act in before)
    converted = TimmSyncBatchNorm().apply(model)
    norms = [m for m in converted.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert [type(m.act) for m in norms] == before
