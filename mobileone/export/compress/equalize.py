"""Cross-layer equalization: the same function, with weights that quantize better.

Between two convolutions with only a ReLU in between, `relu(s z) = s relu(z)` for s > 0, so that an
output channel of the first may be divided by s if that input channel of the second is multiplied
by it. Choosing s = sqrt(r1 r2) / r2, with r1 and r2 the channel's largest weights on either side,
makes both ranges sqrt(r1 r2) (Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1).
"""

import copy

import torch
from torch import Tensor, fx, nn

__all__ = ["equalize"]

_LOWEST = 1e-12  # a channel without weights on one side stays as it is


@torch.no_grad()
def equalize(fused: nn.Module, sweeps: int = 20) -> nn.Module:
    """A copy of a fused network in eval mode with its weight ranges equalized.

    Args:
        fused: any network that torch.fx can trace; layers without such a neighbor stay.
        sweeps: passes over all pairs; the ranges converge within a few.

    Raises:
        ValueError: the network cannot be traced.
    """
    model = copy.deepcopy(fused)
    pairs = _pairs(model)
    for _ in range(sweeps):
        for first, second in pairs:
            _equalize_pair(first, second)
    return model


def _pairs(model: nn.Module) -> list[tuple[nn.Conv2d, nn.Conv2d]]:
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # whatever the model's control flow makes of proxies
        raise ValueError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    modules = dict(model.named_modules())
    found = []
    for node in graph.nodes:
        first = _module(node, modules)
        relu = _only_user(node, modules)
        second = _module(_only_user(relu, modules), modules)
        if (
            isinstance(first, nn.Conv2d)
            and isinstance(_module(relu, modules), nn.ReLU)
            and isinstance(second, nn.Conv2d)
            and second.groups in (1, second.in_channels)
        ):
            found.append((first, second))
    return found


def _equalize_pair(first: nn.Conv2d, second: nn.Conv2d) -> None:
    incoming = _input_channels_first(second)  # (channels between, ...)
    r1 = first.weight.flatten(1).abs().amax(dim=1)
    r2 = incoming.flatten(1).abs().amax(dim=1)
    usable = (r1 > _LOWEST) & (r2 > _LOWEST)
    scale = torch.where(usable, (r1 / r2).sqrt(), torch.ones_like(r1))
    first.weight /= scale.view(-1, 1, 1, 1)
    if first.bias is not None:
        first.bias /= scale
    incoming *= scale.view(-1, *[1] * (incoming.ndim - 1))


def _input_channels_first(conv: nn.Conv2d) -> Tensor:
    """A view of the weights with the input channel in front: (in, ...)."""
    # depthwise: (C, 1, k, k), one input channel an output channel
    return conv.weight if conv.groups > 1 else conv.weight.transpose(0, 1)


def _only_user(node: fx.Node | None, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The one operation that takes the output of `node`, past identities; None if it is not one."""
    while node is not None:
        users = list(node.users)
        node = users[0] if len(users) == 1 else None
        if not isinstance(_module(node, modules), nn.Identity):
            break
    return node


def _module(node: fx.Node | None, modules: dict[str, nn.Module]) -> nn.Module | None:
    if node is None or node.op != "call_module":
        return None
    return modules.get(str(node.target))
