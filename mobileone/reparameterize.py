"""Reparameterization of a whole model."""

from copy import deepcopy

from timm.models import reparameterize_model
from torch import nn

__all__ = ["reparameterize"]


def reparameterize(model: nn.Module) -> nn.Module:
    """Fold every reparameterizable block of a model into its inference form.

    Takes any timm model that timm itself can fuse (MobileOne, RepVGG, FastViT, RepViT …), a
    single block, or a module that holds such models at any depth. Folding uses BatchNorm's
    running statistics; on a MobileOne in training mode a warning says that its function changes.

    Args:
        model: The model; it stays as it is.

    Returns:
        A copy in inference form, in the same mode and on the same device. Folding a folded model
        returns a plain copy.

    Example:
        >>> model = timm.create_model("mobileone_s0").eval()
        >>> fused = mobileone.reparameterize(model)
    """
    holder = nn.ModuleList([deepcopy(model)])  # timm folds the children of what it is given
    reparameterize_model(holder, inplace=True)
    return holder[0]
