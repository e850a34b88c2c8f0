"""Object detection: torchvision's SSD with SSDLite's head on a timm model.

MobileOne, arXiv 2206.04040, section 4.3, detects with SSDLite (Sandler et al., arXiv 1801.04381,
section 6.2) at 320 pixels.
"""

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation

import mobileone.registration  # noqa: F401  (registers the family with timm)

__all__ = ["SSDBoxes", "SSDFeatures", "ssdlite"]

_EXTRA = (512, 256, 256, 128)  # channels of the coarser maps, as in torchvision's SSDLite
_LARGEST = 0.95  # side of the coarsest map's anchors, as a part of the image's
_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


class SSDFeatures(nn.Module):
    """The backbone's maps of strides 16 and 32, and four coarser ones.

    Args:
        backbone: Returns the two maps.
        channels: Of the second.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.extra = nn.ModuleList()
        for width in _EXTRA:
            self.extra.append(_halve(channels, width))
            channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> six maps, each half the size of the one before."""
        maps: list[Tensor] = self.backbone(images)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return {str(number): features for number, features in enumerate(maps)}


class SSDBoxes(nn.Module):
    """An SSD from normalized images to boxes, before non-maximum suppression: what a phone runs.

    Boxes are decoded as `torchvision.models.detection.ssd.SSD` does (Liu et al., arXiv 1512.02325,
    section 2.2): an anchor's center moves by parts of its sides, its sides grow by exponentials.

    Args:
        network: An SSD of torchvision, with images of one size.
    """

    centers: Tensor
    sides: Tensor
    largest: Tensor

    def __init__(self, network: SSD) -> None:
        super().__init__()
        self.backbone, self.head = network.backbone, network.head
        width, height = network.transform.fixed_size
        example = torch.zeros(1, 3, height, width, dtype=next(network.parameters()).dtype)
        was_training = network.training
        with torch.no_grad():
            features = list(network.backbone.eval()(example).values())
        network.train(was_training)
        images = ImageList(example, [(height, width)])
        anchors = network.anchor_generator(images, features)[0]  # (A, 4), corners in pixels
        corners = anchors / torch.tensor([width, height, width, height])
        self.register_buffer("centers", (corners[:, :2] + corners[:, 2:]) / 2)
        self.register_buffer("sides", corners[:, 2:] - corners[:, :2])
        self._move, _, self._growth, _ = network.box_coder.weights  # of x as of y
        self.register_buffer("largest", torch.tensor(network.box_coder.bbox_xform_clip))
        self.train(was_training)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) -> boxes (N, A, 4), probabilities (N, A, classes).

        Boxes are x1, y1, x2, y2 as parts of the image's width and height.
        """
        answer = self.head(list(self.backbone(images).values()))
        offsets = answer["bbox_regression"]  # (N, A, 4)
        centers = self.centers + offsets[..., :2] / self._move * self.sides
        growth = torch.minimum(offsets[..., 2:] / self._growth, self.largest)
        sides = growth.exp() * self.sides
        boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=-1).clamp(0, 1)
        return boxes, answer["cls_logits"].softmax(dim=-1)


def ssdlite(
    model: str,
    num_classes: int,
    *,
    size: int = 320,
    smallest_anchor: float = 0.2,
    pretrained: bool = False,
) -> SSD:
    """SSDLite on a timm model, with torchvision's anchors, loss and non-maximum suppression.

    Args:
        model: timm name, for example `mobileone_s1`.
        num_classes: Classes, background (0) included.
        size: Side in pixels to which images are resized; at least 64.
        smallest_anchor: Side of the square anchors on the finest map, as a part of the image's; the
            others grow from it to 0.95. COCO has small objects, hence 0.2. Where objects are
            larger, anchors of their size should be on the finest map, which has the most places.
        pretrained: Start the backbone from timm's weights.

    Returns:
        The network of torchvision's interface: a list of images (3, H, W) in 0..1, and in training
        targets with `boxes` (B, 4) as x1, y1, x2, y2 and `labels` (B,); it returns losses in
        training and else `boxes`, `scores` and `labels` of each image.

    Raises:
        ValueError: A number is out of range.
    """
    if num_classes < 2:
        raise ValueError(f"`num_classes` (={num_classes}) must be at least 2, background included")
    if size < 64:
        raise ValueError(f"`size` (={size}) must be at least 64: the coarsest map has stride 512")
    if not 0 < smallest_anchor < _LARGEST:
        raise ValueError(
            f"`smallest_anchor` (={smallest_anchor}) must be between 0 and {_LARGEST}, the largest"
        )
    backbone: Any = timm.create_model(
        model, features_only=True, out_indices=(-2, -1), pretrained=pretrained
    )
    features = SSDFeatures(backbone, backbone.feature_info.channels()[-1])
    widths = [*backbone.feature_info.channels(), *_EXTRA]
    anchors = DefaultBoxGenerator([[2, 3] for _ in widths], smallest_anchor, _LARGEST)
    counts = anchors.num_anchors_per_location()
    config = timm.get_pretrained_cfg(model)
    mean, std = (config.mean, config.std) if config else ((0.5,) * 3, (0.5,) * 3)
    return SSD(
        features,
        anchors,
        (size, size),
        num_classes,
        list(mean),
        list(std),
        SSDLiteHead(widths, counts, num_classes, _NORM),
        score_thresh=0.001,
        nms_thresh=0.55,
        detections_per_img=300,
        topk_candidates=300,
    )


def _halve(inputs: int, outputs: int) -> nn.Sequential:
    """SSDLite's extra block: narrow, depthwise with stride 2, widen."""
    block = partial(Conv2dNormActivation, norm_layer=_NORM, activation_layer=nn.ReLU6)
    middle = outputs // 2
    layers = nn.Sequential(
        block(inputs, middle, kernel_size=1),
        block(middle, middle, kernel_size=3, stride=2, groups=middle),
        block(middle, outputs, kernel_size=1),
    )
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.03)
    return layers
