"""The forms as functions that autograd and the compiler know."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mobileone.collapsed import affine, depthwise, gram, stacked
from mobileone.collapsed.branches import Geometry
from mobileone.collapsed.cost_model import Path

__all__ = ["CollapsedConvolution", "Form"]


class Form(NamedTuple):
    """How a form computes.

    Attributes:
        forward: Called as (x, parameters, geometry, relu, dtype, inward): the convolution runs in
            `dtype`, and `inward` says whether ∂L/∂x will be wanted. Returns y (N, C_out, H', W'),
            the batch means and biased variances of the branches, (branches, G, O), and what the
            backward pass needs besides x, y and the parameters.
        backward: Called as (∂L/∂y, x, y where there is a rectifier, means, variances and what else
            was kept, parameters, geometry, inward). Returns ∂L/∂x, empty where it is not wanted,
            and the gradient of every parameter.
        empty_outputs: Called as (x, geometry, dtype): what `forward` returns, without the values,
            in the dtypes that a compiler gets. None: it traces the form as any operations.
    """

    forward: Callable[..., list[Tensor]]
    backward: Callable[..., list[Tensor]]
    empty_outputs: Callable[[Tensor, Geometry, torch.dtype], list[Tensor]] | None


_FORMS = {
    Path.GRAM: Form(gram.forward, gram.backward, gram.empty_outputs),
    Path.DEPTHWISE: Form(depthwise.forward, depthwise.backward, depthwise.empty_outputs),
    Path.AFFINE: Form(affine.forward, affine.backward, affine.empty_outputs),
    Path.STACKED: Form(stacked.forward, stacked.backward, None),
}


class CollapsedConvolution(torch.autograd.Function):
    """y = Ŵ ∗ x + b̂, rectified on demand; keeps x, y (the next block's x) and what the form does.

    Called as `apply(x, path, geometry, relu, dtype, *parameters)`. Returns y (N, C_out, H', W')
    and, for the running averages, the batch means and biased variances of the branches,
    (branches, C_out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        path: Path,
        geometry: Geometry,
        relu: bool,
        dtype: torch.dtype,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inward = ctx.needs_input_grad[0]
        if torch.compiler.is_compiling() and _FORMS[path].empty_outputs is not None:
            outputs = _opaque_forward(x, tensors, path.name, *_pack(geometry), relu, dtype, inward)
        else:
            outputs = _FORMS[path].forward(x, tensors, geometry, relu, dtype, inward)
        y, mean, var, *kept = outputs
        ctx.path, ctx.geometry, ctx.count = path, geometry, 2 + len(kept)
        ctx.save_for_backward(x, y if relu else None, mean, var, *kept, *tensors)
        mean, var = mean.flatten(1), var.flatten(1)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *rest = ctx.saved_tensors
        kept, tensors, inward = rest[: ctx.count], rest[ctx.count :], ctx.needs_input_grad[0]
        path, geometry = ctx.path, ctx.geometry
        if torch.compiler.is_compiling() and _FORMS[path].empty_outputs is not None:
            grads = _opaque_backward(g, x, y, kept, tensors, path.name, *_pack(geometry), inward)
        else:
            with torch.autocast(g.device.type, enabled=False):
                grads = _FORMS[path].backward(g, x, y, kept, tensors, geometry, inward)
        return grads[0] if inward else None, None, None, None, None, *grads[1:]


# -- Operators that a compiler takes as they are: it cannot see into calls of our kernels ---------


@torch.library.custom_op("mobileone::collapsed_forward", mutates_args=())
def _opaque_forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    path: str,
    shape: Sequence[int],
    eps: Sequence[float],
    relu: bool,
    dtype: torch.dtype,
    inward: bool,
) -> list[Tensor]:
    geometry = _unpack(shape, eps)
    outputs = _FORMS[Path[path]].forward(x, tensors, geometry, relu, dtype, inward)
    declared = _empty_outputs(x.to("meta"), tensors, path, shape, eps, relu, dtype, inward)
    return _apart([y.to(like.dtype) for y, like in zip(outputs, declared, strict=True)])


@_opaque_forward.register_fake
def _empty_outputs(
    x: Tensor,
    tensors: Sequence[Tensor],
    path: str,
    shape: Sequence[int],
    eps: Sequence[float],
    relu: bool,
    dtype: torch.dtype,
    inward: bool,
) -> list[Tensor]:
    empty_outputs = _FORMS[Path[path]].empty_outputs
    assert empty_outputs is not None
    return empty_outputs(x, _unpack(shape, eps), dtype)


@torch.library.custom_op("mobileone::collapsed_backward", mutates_args=())
def _opaque_backward(
    g: Tensor,
    x: Tensor,
    y: Tensor | None,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    path: str,
    shape: Sequence[int],
    eps: Sequence[float],
    inward: bool,
) -> list[Tensor]:
    geometry = _unpack(shape, eps)
    with torch.autocast(g.device.type, enabled=False):
        grads = _FORMS[Path[path]].backward(g, x, y, kept, tensors, geometry, inward)
    return _apart(grads)


@_opaque_backward.register_fake
def _empty_grads(
    g: Tensor,
    x: Tensor,
    y: Tensor | None,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    path: str,
    shape: Sequence[int],
    eps: Sequence[float],
    inward: bool,
) -> list[Tensor]:
    planes = torch.contiguous_format
    dx = torch.empty_like(x, memory_format=planes) if inward else x.new_empty(0)
    return [dx, *(torch.empty_like(tensor, memory_format=planes) for tensor in tensors)]


def _pack(geometry: Geometry) -> tuple[list[int], list[float]]:
    """A geometry in types that operators take; ε is its last field."""
    *shape, eps = (getattr(geometry, name) for name in geometry.__dataclass_fields__)
    return [int(n) for n in shape], list(eps)


def _unpack(shape: Sequence[int], eps: Sequence[float]) -> Geometry:
    *sizes, skip = shape
    return Geometry(*sizes, bool(skip), tuple(eps))  # type: ignore[arg-type, call-arg]


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors in rows, none of which shares memory with another, as operators have to return."""
    seen: set[int] = set()
    apart = []
    for tensor in tensors:
        tensor = tensor.contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart.append(tensor)
    return apart
