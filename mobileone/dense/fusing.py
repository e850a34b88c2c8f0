"""A network for inference: the backbone's branches become one convolution, and norms fold."""

from torch import nn

from mobileone.folding import fold_norm_into
from mobileone.reparameterize import reparameterize

__all__ = ["fuse"]


def fuse(network: nn.Module) -> nn.Module:
    """A copy without branches, and without batch norms that follow a convolution in a sequence.

    So are the blocks of torchvision's heads and of segmentation-models-pytorch's decoders built.
    The copy computes what the network computes in eval mode.

    Args:
        network: Of `mobileone.dense`, in eval mode.

    Raises:
        ValueError: The network is in training mode.
    """
    if network.training:
        raise ValueError(
            "`network` is in training mode, where its norms are not fixed: call eval()"
        )
    fused = reparameterize(network)
    for sequence in fused.modules():
        if isinstance(sequence, nn.Sequential):
            _fold_norms(sequence)
    return fused


def _fold_norms(sequence: nn.Sequential) -> None:
    for index, norm in enumerate(list(sequence)[1:], 1):
        convolution = _last(sequence[index - 1])
        # without running statistics a norm computes with those of the batch
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        if isinstance(convolution, nn.Conv2d):
            fold_norm_into(convolution, norm)
            sequence[index] = nn.Identity()


def _last(module: nn.Module) -> nn.Module:
    """The module that computes a sequence's output."""
    return _last(module[-1]) if isinstance(module, nn.Sequential) and len(module) else module
