"""Networks on the family's features: shapes, exact fusing, and what torchvision expects."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from mobileone import reparameterize
from mobileone.block import MobileOneBlock
from mobileone.dense import SEGMENTERS, deeplabv3, fuse, segmenter, ssdlite
from mobileone.dense.detection import SSDBoxes
from tests.helpers.branches import by_branches
from tests.helpers.norms import randomize_bn
from tests.helpers.variants import slow_where


def smp_or_skip(architecture):
    if architecture != "deeplabv3":
        pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `dense`")


@pytest.mark.parametrize(
    "architecture", slow_where(("unet", "deeplabv3plus").__contains__, SEGMENTERS)
)
def test_fused_segmentation_is_exact(architecture):
    """Against the sum of the branches, in float64."""
    smp_or_skip(architecture)
    network = randomize_bn(segmenter(architecture, "mobileone_s0", 3)).double().eval()
    fused = fuse(network)
    assert not any(isinstance(m, MobileOneBlock | nn.BatchNorm2d) for m in fused.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = by_branches(network)(images)
        found = fused(images)
    assert found.shape == (2, 3, 64, 64)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_fused_detector_is_exact():
    network = ssdlite("mobileone_s0", 4, size=96).double().eval()
    randomize_bn(network)
    fused = fuse(network)
    assert not any(isinstance(m, MobileOneBlock | nn.BatchNorm2d) for m in fused.modules())
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        pairs = zip(SSDBoxes(fused)(images), SSDBoxes(by_branches(network))(images), strict=True)
        for found, expected in pairs:
            assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
        answers = zip(fused(list(images)), network(list(images)), strict=True)
        for found, expected in answers:
            assert torch.equal(found["labels"], expected["labels"])
            assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-8)


def test_fusing_leaves_the_network_and_refuses_training_mode():
    network = ssdlite("mobileone_mu0", 4, size=64)
    with pytest.raises(ValueError, match="training mode"):
        fuse(network)
    before = {name: value.clone() for name, value in network.eval().state_dict().items()}
    fuse(network)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_boxes_are_those_that_torchvision_decodes():
    """All of torchvision's detections, before suppression, against the graph's rows."""
    network = ssdlite("mobileone_mu0", 4, size=96).double().eval()
    network.score_thresh, network.nms_thresh = 0.0, 1.0
    network.topk_candidates = network.detections_per_img = 10**6
    for parameter in network.head.regression_head.parameters():
        parameter.data *= 300  # boxes far from their anchors, some of them cut or at the limit
    images = torch.rand(1, 3, 96, 96, dtype=torch.float64)
    graph = SSDBoxes(network)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in network_statistics(network))
    with torch.no_grad():
        boxes, scores = graph((images - mean) / std)
        (found,) = network(list(images))
    anchors = boxes.shape[1]
    assert len(found["boxes"]) == 3 * anchors
    for label in (1, 2, 3):
        order = scores[0, :, label].argsort(descending=True)  # as torchvision's
        chosen = found["labels"] == label
        assert torch.allclose(found["scores"][chosen], scores[0, order, label])
        # anchors come in float32, and huge factors: pixels
        assert (found["boxes"][chosen] - boxes[0, order] * 96).abs().max() < 1e-3


def test_the_smallest_anchor_is_on_the_finest_map():
    """Square ones of the side that was asked for, at every place of the map of stride 16."""
    network = ssdlite("mobileone_mu0", 4, size=96, smallest_anchor=0.35).eval()
    graph = SSDBoxes(network)
    square = (graph.sides - 0.35).abs().amax(dim=1) < 1e-4
    centers = graph.centers[square] * 6  # of the 6 x 6 places
    assert len(centers) == 36 and len(centers.unique(dim=0)) == 36
    assert torch.allclose(centers % 1, torch.tensor(0.5), atol=1e-3)
    assert graph.sides.min() >= 0.35 / 3**0.5 - 1e-4 and graph.sides.max() <= 1


def network_statistics(network):
    return network.transform.image_mean, network.transform.image_std


def test_deeplabv3_is_torchvisions_head_on_timms_features():
    network = deeplabv3("mobileone_s0", 5, output_stride=8).eval()
    features = timm.create_model("mobileone_s0", features_only=True, output_stride=8).eval()
    features.load_state_dict(network.backbone.state_dict())
    head = DeepLabHead(1024, 5, (12, 24, 36)).eval()
    head.load_state_dict(network.head.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        small = head(features(images)[-1])
        assert small.shape == (1, 5, 8, 8)
        expected = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear")
        assert torch.allclose(network(images), expected, rtol=1e-4)


def test_detector_has_a_loss_in_training_and_boxes_after():
    network = ssdlite("mobileone_mu0", 4, size=64)
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 80)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = network(images, targets)
    assert set(losses) == {"bbox_regression", "classification"}
    sum(losses.values()).backward()
    assert network.backbone.backbone.stem.conv_kxk[0].conv.weight.grad.abs().sum() > 0
    boxes = network.eval()(images)[1]["boxes"]
    assert boxes[:, 2].max() <= 80 and boxes[:, 3].max() <= 50  # in the image's own pixels


@pytest.mark.parametrize("model", ["mobileone_s4", "repvgg_a0"])
def test_other_backbones(model):
    fused = reparameterize(deeplabv3(model, 2).eval())
    assert fused(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deeplabv3("mobileone_s0", 3, output_stride=4), r"output_stride.*\[8, 16, 32\]"),
        (lambda: deeplabv3("mobileone_s0", 1), "num_classes.*background"),
        (lambda: segmenter("unest", "mobileone_s0", 3), "unest.*deeplabv3, unet"),
        (lambda: ssdlite("mobileone_s0", 1), "num_classes.*background"),
        (lambda: ssdlite("mobileone_s0", 3, size=32), "size.*at least 64"),
        (lambda: ssdlite("mobileone_s0", 3, smallest_anchor=1.0), r"smallest_anchor.*0\.95"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
