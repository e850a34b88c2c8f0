"""The unfused network in evaluation mode through torch's compilers and tracers."""

import pytest
import torch
from torch import fx

from mobileone.model import MobileOne
from mobileone.variants import Variant
from tests.helpers.norms import randomize_bn


def network():
    """One pair of blocks a stage: all kinds that a larger one has."""
    return MobileOne(Variant((1, 1, 1, 1), (0.25, 0.25, 0.25, 0.25)), num_classes=3)


@pytest.fixture
def model():
    return randomize_bn(network()).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


CAPTURES = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "fx": lambda model, x: fx.symbolic_trace(model),
}


@torch.no_grad()
@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
def test_captured_evaluation_equals_eager(capture, model, x):
    expected = model(x)
    assert expected.std() > 0
    torch.testing.assert_close(capture(model, x)(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_evaluation_equals_eager_and_follows_weight_changes(model, x):
    torch.compiler.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = fast(x)
    torch.testing.assert_close(first, model(x), rtol=1e-4, atol=1e-5)
    model.stem.conv_kxk[0].conv.weight.mul_(2)
    model.stages[0][1].identity.running_mean.add_(1)
    changed = fast(x)
    assert (changed - first).abs().max() > 0.01 * first.abs().max()
    torch.testing.assert_close(changed, model(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(network().state_dict())
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
