"""What a LightningModule must offer so that its network can ship."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mobileone.export import ExportSpec
from mobileone.export.preprocess import denormalise

__all__ = ["network_of", "pixels_of", "spec_of"]


def network_of(pl_module: LightningModule) -> nn.Module:
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


def spec_of(pl_module: LightningModule) -> ExportSpec:
    """The module's `export_spec`.

    Raises:
        TypeError: it is something else.
    """
    spec = pl_module.export_spec
    if not isinstance(spec, ExportSpec):
        raise TypeError(f"`export_spec` must be an ExportSpec, not {type(spec).__name__}")
    return spec


def pixels_of(batch: Any, spec: ExportSpec, count: int = 8) -> Tensor | None:
    """The first 8-bit images of a batch (images, ...); None if they are not of the spec's size."""
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != spec.input_size:
        return None
    return denormalise(images[:count], spec)
