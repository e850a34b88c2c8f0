"""Bytes that operations read and write, by module: an estimate of memory traffic."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["memory_traffic"]


@torch.no_grad()
def memory_traffic(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Bytes moved in one pass, if each operation reads its inputs and writes its outputs once.

    Weights count as inputs. Nothing stays in a cache and no operations are merged, so it is what
    the network asks for, not what a machine does; views are free.

    Args:
        model: In eval mode.
        x: (N, C, H, W).

    Returns:
        Bytes by the name of the innermost module in whose forward the operation ran; "" is the
        model itself.
    """
    with _Counter(model) as counter:
        model(x)
    return dict(counter.moved)


class _Counter(TorchDispatchMode):
    """Adds up what reaches PyTorch's dispatcher, by the module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.moved: defaultdict[str, int] = defaultdict(int)
        self._running: list[str] = []
        self._hooks = []
        for name, module in model.named_modules():
            self._hooks.append(
                module.register_forward_pre_hook(
                    lambda module, inputs, name=name: self._running.append(name)
                )
            )
            self._hooks.append(
                module.register_forward_hook(lambda module, inputs, output: self._leave())
            )

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = list(_tensors((args, kwargs)))
        written = list(_tensors(output))
        places = {t.untyped_storage().data_ptr() for t in read}
        view = not func._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in places for t in written
        )
        if not view:
            self.moved[self._running[-1] if self._running else ""] += sum(
                t.numel() * t.element_size() for t in (*read, *written)
            )
        return output

    def _leave(self) -> None:
        self._running.pop()


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
