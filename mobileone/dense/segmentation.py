"""Semantic segmentation: torchvision's DeepLabV3 head, or a decoder of segmentation-models-pytorch.

MobileOne, arXiv 2206.04040, section 4.3, segments with DeepLabV3 (Chen et al., arXiv 1706.05587).
"""

from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import mobileone.registration  # noqa: F401  (registers the family with timm)
from mobileone.io.optional_import import import_optional

__all__ = ["SEGMENTERS", "DeepLabV3", "deeplabv3", "segmenter"]

# what arXiv 1706.05587 pairs: the rates double where the features are twice as fine
_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}

SEGMENTERS = ("deeplabv3", "unet", "fpn", "deeplabv3plus")
"""Ours with torchvision's head, and the tested ones of segmentation-models-pytorch."""


class DeepLabV3(nn.Module):
    """Features -> torchvision's DeepLabV3 head -> logits at the size of the image.

    Args:
        backbone: Returns a list of feature maps, of which the last is used.
        head: From that map to logits, one channel a class.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalized, -> logits (N, classes, H, W)."""
        size = images.shape[-2:]
        logits = self.head(self.backbone(images)[-1])  # (N, C, H/s, W/s) -> (N, classes, H/s, W/s)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def deeplabv3(
    model: str, num_classes: int, *, output_stride: int = 16, pretrained: bool = False
) -> DeepLabV3:
    """DeepLabV3 on a timm model; its last stages are dilated instead of strided.

    Args:
        model: timm name, for example `mobileone_s0`.
        num_classes: Classes, background included.
        output_stride: Pixels of the image a feature map's pixel: 8, 16 or 32.
        pretrained: Start the backbone from timm's weights.

    Returns:
        The network; images (N, 3, H, W) -> logits (N, classes, H, W).

    Raises:
        ValueError: A number is out of range.
    """
    if output_stride not in _RATES:
        raise ValueError(f"`output_stride` (={output_stride}) must be one of {sorted(_RATES)}")
    _check_classes(num_classes)
    backbone: Any = timm.create_model(
        model, features_only=True, output_stride=output_stride, pretrained=pretrained
    )
    channels = backbone.feature_info.channels()[-1]
    return DeepLabV3(backbone, DeepLabHead(channels, num_classes, _RATES[output_stride]))


def segmenter(
    architecture: str, model: str, num_classes: int, *, pretrained: bool = False
) -> nn.Module:
    """A segmentation network by its architecture's name.

    Args:
        architecture: One of `SEGMENTERS`.
        model: timm name of the encoder.
        num_classes: Classes, background included.
        pretrained: Start the encoder from timm's weights.

    Returns:
        The network; images (N, 3, H, W) -> logits (N, classes, H, W), with sides that are
        multiples of 32.

    Raises:
        ValueError: An unknown architecture, or a number out of range.
        ImportError: The architecture needs segmentation-models-pytorch, which is not installed.
    """
    if architecture not in SEGMENTERS:
        raise ValueError(
            f"unknown `architecture` (={architecture!r}): use one of {', '.join(SEGMENTERS)}"
        )
    _check_classes(num_classes)
    if architecture == "deeplabv3":
        return deeplabv3(model, num_classes, pretrained=pretrained)
    install = "mobileone-lightning[dense]"
    smp = import_optional("segmentation_models_pytorch", f"`architecture` {architecture}", install)
    network: nn.Module = smp.create_model(
        architecture,
        encoder_name=f"tu-{model}",
        encoder_weights="imagenet" if pretrained else None,
        classes=num_classes,
    )
    return network


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"`num_classes` (={num_classes}) must be at least 2, background included")
