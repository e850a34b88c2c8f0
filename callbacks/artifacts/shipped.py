"""What a LightningModule ships: its network, its spec, and images to compare the files on."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mobileone.export import ExportSpec
from mobileone.export.checkpoint import build_network
from mobileone.export.isolation import isolated
from mobileone.export.preprocess import denormalize

__all__ = [
    "Architecture",
    "architecture",
    "get_network",
    "get_spec",
    "images_due",
    "images_uint8",
    "rebuilt",
]

# name, class, and arguments of each module: two networks that share it compute the same
Architecture = list[tuple[str, type[nn.Module], str]]


def get_network(pl_module: LightningModule) -> nn.Module:
    """The network that ships, without the wrapper of `torch.compile`.

    Raises:
        TypeError: there is no `self.model`.
    """
    model = getattr(pl_module, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{type(pl_module).__name__} must keep the network that ships in `self.model`"
        )
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def get_spec(pl_module: LightningModule) -> ExportSpec:
    """The module's `export_spec`.

    Raises:
        TypeError: it is something else.
    """
    spec = pl_module.export_spec
    if not isinstance(spec, ExportSpec):
        raise TypeError(f"`export_spec` must be an ExportSpec, not {type(spec).__name__}")
    return spec


def architecture(network: nn.Module) -> Architecture:
    """What a network is made of, without its weights."""
    return [(name, type(m), m.extra_repr()) for name, m in network.named_modules()]


def rebuilt(pl_module: LightningModule) -> Architecture | None:
    """The architecture that a checkpoint's hyper-parameters give; None if they give no network."""
    try:
        with isolated():
            return architecture(build_network(get_spec(pl_module), dict(pl_module.hparams)))
    except Exception:  # whatever timm makes of a name and arguments that are not meant for it
        return None


def images_uint8(batch: Any, spec: ExportSpec, count: int) -> Tensor | None:
    """8-bit images of a batch (images, ...), evenly; None if they are not of the spec's size."""
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != spec.input_size:
        return None
    return denormalize(images[:: max(1, len(images) // count)][:count], spec)


def images_due(batch_idx: int, batches: float, count: int) -> int:
    """How many images a batch gives so that all give `count`, evenly, the last one the rest.

    Validation sets are sorted by class. A stream of unknown length gives all of each batch.
    """
    if math.isinf(batches) or batch_idx >= (full := max(1, batches - 1)):  # the last may be short
        return count
    return int(count * (batch_idx + 1) // full - count * batch_idx // full)
