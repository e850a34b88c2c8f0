"""A complete model at once: folded for inference, or set to train collapsed or branch by branch."""

from copy import deepcopy
from typing import get_args

from timm.models import reparameterize_model
from torch import nn

from mobileone.block import MobileOneBlock
from mobileone.collapsed import CollapseMode, log_path_once

__all__ = ["reparameterize", "set_collapse"]


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


def set_collapse(model: nn.Module, mode: CollapseMode) -> None:
    """Set how the MobileOne blocks of a model train.

    The mode belongs to the training run, not to the checkpoint: no state dict holds it, and all
    modes give the same numbers up to rounding.

    Args:
        model: A model with MobileOne blocks anywhere inside.
        mode: "auto", the default, takes the cheapest form of every block by a cost model, on CUDA
            as "measured" does: the fastest in a trial at the first steps; "always" a collapsed one,
            for less memory, on CUDA for blocks of at least four BatchNorms; "never" runs every
            branch.

    Raises:
        ValueError: The mode is unknown, or there is no MobileOne block in training form.
    """
    if mode not in get_args(CollapseMode):
        known = ", ".join(map(repr, get_args(CollapseMode)))
        raise ValueError(f"`mode` (={mode!r}) must be one of {known}")
    blocks = [module for module in model.modules() if isinstance(module, MobileOneBlock)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no MobileOne block with branches to collapse: "
            "`collapse` has no meaning for it"
        )
    for block in blocks:
        block.collapse = mode
    log_path_once.cache_clear()  # a new run logs its paths again
