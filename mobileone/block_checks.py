"""What a MobileOne block refuses, and what it warns of."""

import warnings
from functools import partial
from typing import Any

from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["FoldingNotice", "check_block", "check_norm", "check_norm_factory", "check_statistics"]

_FOLDABLE = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)


class FoldingNotice:
    """Warns once a model, not once a block, that folding in training mode changes the function.

    The blocks of a model share one notice; a deep copy of the model has a fresh start.
    """

    def __init__(self) -> None:
        self.given = False

    def warn_once(self) -> None:
        """Warn, unless this model's user was warned before."""
        if self.given:
            return
        self.given = True
        warnings.warn(
            "folding a MobileOne in training mode: the folded network uses the running "
            "statistics of BatchNorm, so its outputs differ from those of the training-mode "
            "network; call model.eval() first if you compare the two",
            UserWarning,
            stacklevel=4,
        )


def check_block(
    in_chs: int,
    out_chs: int,
    kernel_size: int,
    stride: int,
    groups: int,
    num_conv_branches: int,
    use_scale: bool | None,
    use_skip: bool | None,
) -> None:
    """Refuse arguments of a block that cannot be folded.

    Raises:
        ValueError: One breaks a rule that `MobileOneBlock` states.
    """
    if num_conv_branches < 1:
        raise ValueError(
            f"`num_conv_branches` (={num_conv_branches}) must be at least 1: a block without "
            "convolution branches has no weights to fold into"
        )
    if kernel_size % 2 == 0:
        raise ValueError(
            f"`kernel_size` (={kernel_size}) must be odd, so that the 1×1 and skip branches have "
            "a center to be folded into"
        )
    if use_scale and kernel_size == 1:
        raise ValueError("`use_scale` (=True) needs a `kernel_size` (=1) above 1")
    if in_chs % groups or out_chs % groups:
        raise ValueError(
            f"`groups` (={groups}) must divide `in_chs` (={in_chs}) and `out_chs` (={out_chs})"
        )
    if use_skip and (in_chs != out_chs or stride != 1):
        raise ValueError(
            f"a skip needs `in_chs` (={in_chs}) equal to `out_chs` (={out_chs}) and `stride` "
            f"(={stride}) equal to 1; leave `use_skip` unset to add it only where it fits"
        )


def check_norm_factory(factory: Any) -> None:
    """Refuse a class of normalization that never folds, before a layer of it is built.

    Args:
        factory: A layer class, also inside `functools.partial`; other callables pass.

    Raises:
        ValueError: It is not a BatchNorm's.
    """
    while isinstance(factory, partial):
        factory = factory.func
    if isinstance(factory, type) and not issubclass(factory, _FOLDABLE):
        raise ValueError(_norm_rule(factory.__name__))


def check_norm(norm: nn.Module) -> None:
    """Refuse a normalization layer that never folds.

    Raises:
        ValueError: It is not a BatchNorm with running statistics.
    """
    if not isinstance(norm, _FOLDABLE) or norm.running_mean is None:
        raise ValueError(_norm_rule(str(norm)))


def _norm_rule(norm: str) -> str:
    return (
        f"`norm_layer` (={norm}) must be a BatchNorm with running statistics, since only that "
        "folds exactly into a convolution: for example 'batchnorm', torch.nn.BatchNorm2d, "
        "timm.layers.BatchNormAct2d, or a SyncBatchNorm or frozen BatchNorm converted from one"
    )


def check_statistics(norms: list[nn.Module]) -> None:
    """Refuse to fold layers that have lost what is folded.

    Raises:
        ValueError: A layer keeps no running statistics.
    """
    for bn in norms:
        if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
            raise ValueError(
                f"cannot fold {bn}: it keeps no running mean and variance; build the block with a "
                "BatchNorm that has track_running_stats=True (the default)"
            )
