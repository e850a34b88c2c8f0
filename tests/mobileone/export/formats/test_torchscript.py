import pytest
import timm
import torch

import mobileone
from mobileone.export.formats.table import check_formats
from mobileone.export.formats.torchscript import load, write
from mobileone.export.spec import Metadata
from tests.helpers.norms import randomize_bn
from tests.helpers.tiny import tiny_network, tiny_spec


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_the_file_equals_timms_unfused_model(tmp_path, name):
    """Reference: timm's own blocks with the same weights, branches and BatchNorm unfused."""
    entrypoint = getattr(timm.models.byobnet, name)
    reference = randomize_bn(entrypoint(num_classes=3)).eval()
    ours = timm.create_model(name, num_classes=3)
    ours.load_state_dict(reference.state_dict())
    write(mobileone.reparameterize(ours.eval()), tiny_spec(), tmp_path / "m.pt", Metadata())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = reference(images), load(tmp_path / "m.pt")(images)
    assert (got - expected).abs().max() / expected.abs().max() < 1e-4


def test_float64_fusing_is_exact():
    model = tiny_network().double()
    blocks, images = model[0], torch.randn(2, 3, 16, 16, dtype=torch.float64)
    branches = [*blocks.conv_kxk, blocks.conv_scale]
    expected = torch.relu(sum(branch(images) for branch in branches))
    assert torch.allclose(mobileone.reparameterize(blocks)(images), expected, rtol=1e-10)


def test_unknown_formats_are_named():
    with pytest.raises(ValueError, match=r"\['onyx'\].*torchscript"):
        check_formats(["torchscript", "onyx"])
    with pytest.raises(ValueError, match="one or more"):
        check_formats([])
    with pytest.raises(ValueError, match="must be a list"):
        check_formats("coreml")
