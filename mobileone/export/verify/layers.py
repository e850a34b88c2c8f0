"""The layers of a network that have weights to write, in the order in which it runs them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["layers_in_order", "on_layers"]

Layer = nn.Conv2d | nn.Linear


@contextmanager
def on_layers(model: nn.Module, hook: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Call a forward hook at each convolution and linear layer."""
    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layers_in_order(model: nn.Module) -> Iterator[list[Layer]]:
    """A list that gets the layers that forward passes inside the block call."""
    layers: list[Layer] = []
    with on_layers(model, lambda layer, *_: layers.append(layer)):
        yield layers
