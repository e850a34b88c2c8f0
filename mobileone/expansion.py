"""From the fused form back to branches that compute the same function."""

# torch types every attribute of an nn.Module as `Tensor | Module`
# mypy: disable-error-code="union-attr,arg-type"

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobileone.block import MobileOneBlock
from mobileone.weights import convert_keys

__all__ = ["calibrate", "expand"]

_FUSED = ("reparam_conv.weight", "reparam_conv.bias")


def expand(model: nn.Module, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn fused weights into weights in training form that compute the same in eval mode.

    The first convolution branch of each block takes the fused kernel, its BatchNorm the bias. The
    other branches keep the random kernels of `model`, behind BatchNorms whose scale is 0 (as in
    zero-initialized residual branches), so they add nothing yet, differ from one another and can
    learn. BatchNorm's statistics cannot be had back from the weights: they are those of a fresh
    layer (0 and 1), so in training mode, where the batch's are used, the function is another one,
    and a training from there destroys it. `calibrate` measures them on images; without any, keep
    the BatchNorms in eval mode.

    Args:
        model: a MobileOne in training form, freshly initialized; not changed.
        fused: weights of the same MobileOne in fused form, in any known layout.

    Returns:
        A state dict for `model`. What is not part of a block stays as it is.

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


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Tensor], mean: Callable[[Tensor], Tensor] = lambda x: x
) -> None:
    """Measure BatchNorm's statistics on images; the function in eval mode stays the same.

    In each branch of each block, the running mean and variance become those of the branch's output
    over the images, and scale and shift follow so that nothing changes in eval mode. In training
    mode, where a batch's own statistics take their place, the blocks then compute the same in
    expectation: what was expanded can be trained on. Frozen BatchNorms (`requires_grad` false) use
    no batch's statistics and are left alone.

    As eval mode stays the same, so do the inputs of the later blocks: one pass does for all.

    Args:
        model: with blocks in training form; its mode is put back.
        batches: images (N, C, H, W), such as it will be trained on, on its device.
        mean: over the processes, where several see different images.

    Raises:
        ValueError: there are no images.
    """
    blocks = [m for m in model.modules() if isinstance(m, MobileOneBlock)]
    moments: dict[_BatchNorm, Tensor] = {}
    hooks = [block.register_forward_pre_hook(partial(_observe, moments)) for block in blocks]
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        for images in batches:
            model(images)
            seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    if not seen:
        raise ValueError("no images to calibrate on: give at least one batch")
    for norm, total in moments.items():
        _move_statistics(norm, mean(total / seen))


def _observe(moments: dict[_BatchNorm, Tensor], block: nn.Module, inputs: tuple[Tensor]) -> None:
    """Add mean and variance over the batch of what each BatchNorm of a block gets, (2, C)."""
    assert isinstance(block, MobileOneBlock)
    branches = [*block.conv_kxk, *([] if block.conv_scale is None else [block.conv_scale])]
    outputs = [(branch.bn, branch.conv(inputs[0])) for branch in branches]
    outputs += [] if block.identity is None else [(block.identity, inputs[0])]
    for norm, output in outputs:
        values = output.to(torch.promote_types(output.dtype, torch.float32))
        var, mean = torch.var_mean(values.transpose(0, 1).flatten(1), dim=1, correction=0)
        found = torch.stack([mean, var])
        moments[norm] = moments[norm] + found if norm in moments else found


def _move_statistics(norm: _BatchNorm, moments: Tensor) -> None:
    """Let a BatchNorm use these statistics and compute the same affine map as before."""
    if not norm.weight.requires_grad:
        return
    scale, shift = _affine(norm)
    norm.running_mean.copy_(moments[0])
    norm.running_var.copy_(moments[1])
    # of what is stored, not of what was measured: the rounding cancels
    stored, mean = _spread(norm), norm.running_mean.cpu().double()
    norm.weight.copy_(scale * stored)
    norm.bias.copy_(shift + scale * mean)


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    scale = norm.weight.cpu().double() / _spread(norm)
    return scale, norm.bias.cpu().double() - scale * norm.running_mean.cpu().double()


def _spread(norm: _BatchNorm) -> Tensor:
    return torch.sqrt(norm.running_var.cpu().double() + norm.eps)


def _branches(block: MobileOneBlock, kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The state of a block's branches; without its attention."""
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
