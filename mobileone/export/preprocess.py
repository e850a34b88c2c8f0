"""Per-channel normalization of 8-bit images, as a function and as the first layer of a model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.spec import ExportSpec

__all__ = ["WithPreprocessing", "denormalize", "normalize", "pixels_runner", "tensor_interface"]


def normalize(images: Tensor, spec: ExportSpec) -> Tensor:
    """Scale 8-bit images (N, C, H, W) to 0..1, subtract the mean, divide by the std."""
    mean = torch.tensor(spec.mean, device=images.device).view(-1, 1, 1)  # (C, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def denormalize(images: Tensor, spec: ExportSpec) -> Tensor:
    """The 8-bit images that normalized ones (N, C, H, W) were made from; exact if they were."""
    mean = torch.tensor(spec.mean).view(-1, 1, 1)  # (C, 1, 1)
    std = torch.tensor(spec.std).view(-1, 1, 1)
    pixels = (images.detach().float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8)


class WithPreprocessing(nn.Module):
    """Pixel values 0..255 to probabilities: `softmax(model((x - 255 mean) / (255 std)))`.

    The affine map is a layer of its own and not folded into the first convolution: a padded
    convolution pads *after* the normalization with zeros, which a folded bias would turn into
    `-mean / std` at the borders. Core ML's own image scale is one number for all channels.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, spec: ExportSpec) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(spec.std).view(1, -1, 1, 1)))
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of 0..255 -> (N, classes) probabilities."""
        return torch.softmax(self.logits(x), dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of 0..255 -> (N, classes) logits."""
        return self.model((x - self.mean) * self.scale)


def pixels_runner(module: nn.Module, spec: ExportSpec) -> Callable[[Tensor], Any]:
    """A module of normalized images as a function of 8-bit images (N, C, H, W)."""

    @torch.no_grad()
    def run(images: Tensor) -> Any:
        return module(normalize(images, spec))

    return run


def tensor_interface(spec: ExportSpec, outputs: Sequence[str] | None = None) -> dict[str, Any]:
    """Normalized float images (N, C, H, W) in, named tensors or logits (N, classes) out."""
    logits = {
        "type": "tensor",
        "dtype": "float32",
        "shape": ["N", spec.num_classes],
        "kind": "logits",
    }
    return {
        "input": {
            "type": "tensor",
            "dtype": "float32",
            "shape": ["N", *spec.input_size],
            "layout": "NCHW",
            "normalized": True,
        },
        "output": {"type": "tensors", "names": list(outputs)} if outputs else logits,
    }
