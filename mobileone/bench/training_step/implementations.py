"""Networks whose training cost is compared, and the images that they train on."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="arg-type,union-attr"

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import byobnet
from torch import Tensor, nn

from mobileone.block import MobileOneBlock
from mobileone.collapsed import CollapseMode
from mobileone.folding import slice_before_1x1
from mobileone.reparameterize import set_collapse

__all__ = [
    "IMPLEMENTATIONS",
    "WAYS",
    "ImageKind",
    "build_implementation",
    "change_of",
    "check_implementation",
    "plain_network",
    "sample_images",
]


def plain_network(model: nn.Module) -> nn.Module:
    """Copy a MobileOne with every block as one convolution, BatchNorm, (attention,) ReLU.

    That is the network that the fused model would be, trained from the start without branches.
    """
    model = copy.deepcopy(model)
    for name, block in list(model.named_modules()):
        if isinstance(block, MobileOneBlock):
            conv = block.conv_kxk[0].conv
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                conv=conv, bn=nn.BatchNorm2d(conv.out_channels)
            )
            if not isinstance(block.attn, nn.Identity):
                layers["attn"] = block.attn
            layers["act"] = block.act
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Sequential(layers))
    return model


def _ours(variant: str, mode: CollapseMode = "auto") -> nn.Module:
    model = timm.create_model(variant)
    set_collapse(model, mode)
    return model


_NETWORKS: dict[str, Callable[[str], nn.Module]] = {
    "timm": lambda variant: getattr(byobnet, variant)(),
    "ours": _ours,
    "ours always": lambda variant: _ours(variant, "always"),
    "ours measured": lambda variant: _ours(variant, "measured"),
    "plain": lambda variant: plain_network(_ours(variant)),
}
WAYS: dict[str, str | None] = {
    "": None,
    " compiled": "default",
    " reduce-overhead": "reduce-overhead",
    " graphs": None,
}
"""How a network runs, by the end of an implementation's name, and `torch.compile`'s mode: in eager
mode, compiled, compiled with CUDA graphs, or as CUDA graphs of the eager kernels."""

IMPLEMENTATIONS = {
    network + way: (build, mode)
    for network, build in _NETWORKS.items()
    for way, mode in WAYS.items()
}
"""What each implementation builds from a variant's name, and how it is compiled."""


def check_implementation(name: str, variant: str) -> None:
    """Make sure that an implementation can be built.

    Raises:
        ValueError: It is unknown, or timm has no such variant to compare with.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"`contenders` (={name!r}) must be one of {', '.join(IMPLEMENTATIONS)}")
    if not hasattr(byobnet, variant) or not variant.startswith("mobileone_"):
        known = ", ".join(n for n in sorted(dir(byobnet)) if n.startswith("mobileone_s"))
        raise ValueError(f"`model` (={variant!r}) is not one of timm's MobileOnes: {known}")


def change_of(name: str, device: str, channels_last: bool) -> str | None:
    """What is changed in an implementation, so that it survives, and why; None: nothing.

    It concerns timm's stem on a CPU in channels-last, which compilers choose by themselves.
    """
    compiled = IMPLEMENTATIONS[name][1] is not None
    in_danger = name.startswith("timm") and (compiled or channels_last)
    if in_danger and device.startswith("cpu"):
        return "the stem's 1×1 branch takes every second pixel first, for oneDNN's issue 6035"
    return None


def build_implementation(
    name: str, variant: str, device: str, channels_last: bool = False
) -> nn.Module:
    """Build a network in training mode from a fixed seed, changed as `change_of` reports.

    Args:
        name: One of `IMPLEMENTATIONS`.
        variant: timm's name of the model.
        device: Where it goes.
        channels_last: Memory format of its kernels.

    Raises:
        ValueError: As `check_implementation`.
    """
    check_implementation(name, variant)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build, mode = IMPLEMENTATIONS[name]
        model = build(variant)
    if mode is not None:
        model.compile(mode=mode)
    if change_of(name, device, channels_last) is not None:
        slice_before_1x1(model.stem.conv_scale.conv)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=form).train()


ImageKind = Literal["photos", "noise"]
"""`photos`: neighbors are alike, as in what networks train on; `noise`: nothing is."""

_PHOTOS = ("china.jpg", "flower.jpg")
_SMALLEST = 0.4  # side of a crop, of the photograph's height


def sample_images(kind: ImageKind, number: int, size: int) -> Tensor:
    """Images (number, 3, size, size) of mean 0 and deviation 1 about, the same in every call.

    Args:
        kind: Which images. Photographs are the two that scikit-learn ships, in square crops of
            random place and size, normalized as ImageNet's.
        number: How many.
        size: Height and width in pixels.
    """
    chance = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(number, 3, size, size, generator=chance)
    photos = _photographs()
    crops = []
    for i in range(number):
        photo = photos[i % len(photos)]
        height, width = photo.shape[1:]
        part, top, left = torch.rand(3, generator=chance).tolist()
        side = round(height * (_SMALLEST + (1 - _SMALLEST) * part))
        top, left = round(top * (height - side)), round(left * (width - side))
        crop = photo[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (torch.cat(crops) - mean) / std


def _photographs() -> list[Tensor]:
    """In [0, 1], (3, H, W)."""
    from sklearn.datasets import load_sample_image  # takes a second

    arrays = [load_sample_image(name) for name in _PHOTOS]
    return [torch.tensor(array).permute(2, 0, 1).float() / 255 for array in arrays]
