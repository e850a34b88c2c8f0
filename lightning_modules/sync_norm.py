"""BatchNorm over all processes that keeps the activation inside timm's norms."""

from lightning.pytorch.plugins import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import nn

__all__ = ["TimmSyncBatchNorm"]


class TimmSyncBatchNorm(LayerSync):
    """What `Trainer(sync_batchnorm=True)` does, by timm's conversion.

    torch's turns a `BatchNormAct2d` into a plain SyncBatchNorm and so drops its activation without
    a word. MobileOne's norms have none, but those of most other models do.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert every BatchNorm."""
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the layers as they are: they compute the same outside a process group."""
        return model
