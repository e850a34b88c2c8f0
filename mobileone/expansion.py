"""From the fused form back to branches that compute the same function."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="union-attr,arg-type"

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mobileone.block import MobileOneBlock
from mobileone.weights import convert_keys

__all__ = ["expand"]

_FUSED = ("reparam_conv.weight", "reparam_conv.bias")


def expand(model: nn.Module, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn fused weights into weights in training form that compute the same in eval mode.

    The first convolution branch of each block takes the fused kernel, its BatchNorm the bias. The
    other branches keep the random kernels of `model`, behind BatchNorms whose scale is 0 (as in
    zero-initialised residual branches), so they add nothing yet, differ from one another and can
    learn. BatchNorm's statistics cannot be had back: they are those of a fresh layer (0 and 1), so
    in training mode, where the batch's are used, the function is another one.

    Args:
        model: a MobileOne in training form, freshly initialised; not changed.
        fused: weights of the same MobileOne in fused form, in any known layout.

    Returns:
        A state dict for `model`. What is not part of a block is handed on as it is.

    Raises:
        ValueError: the weights lack a block's fused kernel or bias, or it has another shape.
    """
    weights = convert_keys(fused)
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, MobileOneBlock)}
    expanded: dict[str, Tensor] = {}
    for name, block in blocks.items():
        kernel, bias = (weights.pop(f"{name}.{key}", None) for key in _FUSED)
        expected = block.conv_kxk[0].conv.weight.shape
        if kernel is None or bias is None or kernel.shape != expected:
            found = "missing" if kernel is None or bias is None else tuple(kernel.shape)
            raise ValueError(
                f"`{name}.{_FUSED[0]}` is {found}, not {tuple(expected)}: the weights are not the "
                "fused form of this model"
            )
        branches = _branches(block, kernel, bias)
        expanded.update({f"{name}.{key}": value for key, value in branches.items()})
    return {**expanded, **weights}


def _branches(block: MobileOneBlock, kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The state of a block's branches; attention is not among it."""
    state = {
        key: value.clone()
        for key, value in block.state_dict().items()
        if key.startswith(("conv_kxk.", "conv_scale.", "identity."))
    }
    for key, value in state.items():
        if key.endswith("running_var"):
            value.fill_(1.0)
        elif not key.endswith("conv.weight"):  # mean, scale, shift, count
            value.zero_()
    norm = block.conv_kxk[0].bn
    var = state["conv_kxk.0.bn.running_var"]
    state["conv_kxk.0.conv.weight"] = kernel.to(var.dtype)
    state["conv_kxk.0.bn.weight"] = torch.sqrt(var + norm.eps)
    state["conv_kxk.0.bn.bias"] = bias.to(var.dtype)
    return state
