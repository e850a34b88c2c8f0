"""Pixels and normalized images: functions, a model's first layer, a file's interface."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mobileone.export.spec import ExportSpec

__all__ = [
    "IMAGE",
    "ForDevice",
    "FromPixels",
    "WithPreprocessing",
    "denormalize",
    "for_device",
    "interfaced",
    "normalize",
    "one_by_one",
    "output_names",
    "tensor_interface",
    "tensor_runner",
]

IMAGE = "image"  # what an input of pixels is called


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


class FromPixels(nn.Module):
    """A model of pixel values 0..255: `model((x - 255 mean) / (255 std))`.

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

    def forward(self, image: Tensor) -> Any:
        """(N, C, H, W) of 0..255 -> what the model returns."""
        return self.model((image - self.mean) * self.scale)


class WithPreprocessing(FromPixels):
    """A classifier of pixel values 0..255 that returns probabilities."""

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) of 0..255 -> (N, classes) probabilities."""
        return torch.softmax(self.logits(image), dim=1)

    def logits(self, image: Tensor) -> Tensor:
        """(N, C, H, W) of 0..255 -> (N, classes) logits."""
        logits: Tensor = super().forward(image)
        return logits


def interfaced(
    model: nn.Module, spec: ExportSpec, outputs: Sequence[str] | None = None
) -> nn.Module:
    """What a file of tensors holds: the model, or with `spec.pixels` all from pixels on.

    Args:
        model: fused network in eval mode; normalized images (N, C, H, W) -> its outputs.
        spec: what the model expects, and what the file takes.
        outputs: names of what the model returns; None for a classifier, which with `spec.pixels`
            returns probabilities.
    """
    if not spec.pixels:
        return model
    return FromPixels(model, spec) if outputs else WithPreprocessing(model, spec)


class ForDevice(NamedTuple):
    """What a file for devices holds: all from the pixels of one image to the outputs.

    Attributes:
        network: pixel values 0..255 (1, C, H, W) -> the outputs.
        given: its input by name, zeros.
        outputs: the outputs' names.
        interface: what the manifest says of the file.
    """

    network: nn.Module
    given: dict[str, Tensor]
    outputs: list[str]
    interface: dict[str, Any]


def for_device(
    model: nn.Module, spec: ExportSpec, outputs: Sequence[str] | None = None
) -> ForDevice:
    """A network as files for devices have it: see `interfaced` for the arguments."""
    pixels = replace(spec, pixels=True)
    interface = tensor_interface(pixels, outputs, batch=1)
    interface["input"]["name"] = IMAGE
    return ForDevice(
        interfaced(model, pixels, outputs),
        {IMAGE: torch.zeros(1, *spec.input_size)},
        output_names(pixels, outputs),
        interface,
    )


def tensor_runner(module: Callable[[Tensor], Any], spec: ExportSpec) -> Callable[[Tensor], Any]:
    """What a file of tensors holds as a function of 8-bit images (N, C, H, W)."""

    @torch.no_grad()
    def run(images: Tensor) -> Any:
        return module(images.float() if spec.pixels else normalize(images, spec))

    return run


def one_by_one(run: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor], Any]:
    """A function of one image (1, C, H, W) to its outputs, as a function of a batch."""

    def batch(images: Tensor) -> Tensor | tuple[Tensor, ...]:
        columns = zip(*(run(image[None]) for image in images), strict=True)
        joined = tuple(torch.cat(column) for column in columns)
        return joined[0] if len(joined) == 1 else joined

    return batch


def output_names(spec: ExportSpec, outputs: Sequence[str] | None = None) -> list[str]:
    """The names of what a file of tensors returns; `outputs` is None for a classifier."""
    return list(outputs or ["probabilities" if spec.pixels else "logits"])


def tensor_interface(
    spec: ExportSpec, outputs: Sequence[str] | None = None, batch: int | str = "N"
) -> dict[str, Any]:
    """What the manifest says of a file of tensors.

    Args:
        spec: says whether it takes pixels.
        outputs: names of what it returns; None for a classifier.
        batch: size of a batch; `N` for any.
    """
    names = output_names(spec, outputs)
    classes = {
        "type": "tensor",
        "dtype": "float32",
        "shape": [batch, spec.num_classes],
        "kind": names[0],
    }
    return {
        "input": {
            "type": "tensor",
            "dtype": "float32",
            "shape": [batch, *spec.input_size],
            "layout": "NCHW",
            **({"range": [0, 255], "normalized": False} if spec.pixels else {"normalized": True}),
        },
        "output": {"type": "tensors", "names": names} if outputs else classes,
    }
