"""Parameters, multiply-adds, activations and memory traffic of networks, next to the paper's."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from mobileone.bench.inference.case import build_form
from mobileone.bench.paper import paper_row
from mobileone.bench.results import Result, Row
from mobileone.bench.suites import build_model, choose_models

__all__ = ["memory_traffic", "profile_models", "profile_module"]


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
    with ModuleTracker() as running, _Counter(running) as counter:
        model(x)
    return dict(counter.moved)


class _Counter(TorchDispatchMode):
    """Adds up what reaches PyTorch's dispatcher, by the module that is running."""

    def __init__(self, running: ModuleTracker) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self._running = running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = list(_tensors((args, kwargs)))
        written = list(_tensors(output))
        places = {t.untyped_storage().data_ptr() for t in read}
        view = not func._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in places for t in written
        )
        if not view:
            # names begin with that of the model's class
            innermost = max(self._running.parents, key=lambda name: name.count("."))
            self.moved[innermost.partition(".")[2]] += sum(
                t.numel() * t.element_size() for t in (*read, *written)
            )
        return output


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


Level = Literal["model", "stage", "layer"]


def profile_models(
    models: Sequence[str],
    input_size: int | None = None,
    level: Level = "model",
    suite: str | None = None,
) -> Result:
    """Count what networks have and do, for one image.

    Multiply-adds (MACs, which the paper calls FLOPs) and activations (elements that convolutions
    and matrix products put out) are fvcore's, of the network in inference form: fused, with
    BatchNorm folded. Operations that fvcore does not count are listed in `uncounted`.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        input_size: Height and width; None: what each model is meant for.
        level: What has a row in the printed table; the result has all three.
        suite: A group of models, in addition: `paper` (Table 9) or `2026`.

    Returns:
        A result of the kind `profile`. Rows have `model`, `level` (`model`, `stage` or `layer`),
        `name`, `parameters_train`, `parameters`, `macs`, `activations`, `traffic_bytes`; those of
        level `model` also `image_size`, `branches_left`, `norms_left`, `uncounted`, and where the
        paper has the model `paper_params_m`, `paper_mmacs` and the differences to them in
        percent, `params_difference` and `macs_difference`. A stage is a child of the model, or a
        child of that if it is a list of modules. A layer is a module without what its own
        children do; so stages and layers each add up to the model.

    Raises:
        ValueError: A name is unknown, or the size is below 1.
    """
    names, choice = choose_models(models, suite)
    if input_size is not None and input_size < 1:
        raise ValueError(f"`input_size` (={input_size}) must be at least 1")
    rows = [row for name in names for row in profile_module(name, build_model(name), input_size)]
    how = {"batch_size": 1, "image_size": input_size, "form": "fused, BatchNorm folded",
           "macs": "fvcore", "element": "float32", "shown": level}  # fmt: skip
    return Result.new("profile", how | choice, rows)


def profile_module(name: str, model: nn.Module, input_size: int | None = None) -> list[Row]:
    """The rows of one network; see `profile_models`.

    Args:
        name: What to call it; names of the paper's models bring the paper's row.
        model: In eval mode.
        input_size: Height and width.
    """
    train, stages = _own_parameters(model), _stage_names(model)
    fused, left, x = build_form(model, input_size)
    own = _own_counts(fused, x)
    uncounted = own.pop("uncounted")
    total = _add(own, lambda layer: "", train)[""]
    row: Row = {"model": name, "level": "model", "name": "", **total, "image_size": x.shape[2]}
    row |= left
    row["uncounted"] = ", ".join(f"{op} ×{count}" for op, count in uncounted.most_common())
    by_stage = _add(own, lambda layer: _stage_of(layer, stages), train)
    layers = _add(own, lambda layer: layer, {})
    return [
        row | _paper_columns(name, total),
        *({"model": name, "level": "stage", "name": k or "(model)", **v}
          for k, v in by_stage.items()),
        *({"model": name, "level": "layer", "name": k or "(model)", **v}
          for k, v in layers.items() if any(v.values())),
    ]  # fmt: skip


def _own_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each module without those of its children; shared ones count once."""
    seen: set[int] = set()
    counts = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        counts[name] = sum(p.numel() for p in own)
    return counts


def _own_counts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Of each module, without its children: parameters, MACs, activations, bytes moved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # shapes are fixed
        from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis  # warns as it is imported

        flops = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
        flops.uncalled_modules_warnings(False)
        flops.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        activations = ActivationCountAnalysis(model, x).unsupported_ops_warnings(False)
        activations.uncalled_modules_warnings(False)
        macs, outputs = flops.by_module(), activations.by_module()
        uncounted = flops.unsupported_ops()
    parameters, traffic = _own_parameters(model), memory_traffic(model, x)
    own: dict[str, Any] = {
        name: {
            "parameters": parameters[name],
            "macs": int(_without_children(macs, name, module)),
            "activations": int(_without_children(outputs, name, module)),
            "traffic_bytes": traffic.get(name, 0),
        }
        for name, module in model.named_modules()
    }
    return own | {"uncounted": uncounted}


def _without_children(counts: Mapping[str, float], name: str, module: nn.Module) -> float:
    prefix = f"{name}." if name else ""
    return counts[name] - sum(counts[prefix + child] for child, _ in module.named_children())


def _add(
    own: Mapping[str, Mapping[str, int]], group: Callable[[str], str], train: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Sums over the modules of each group, in the order of their first modules."""
    sums: dict[str, Counter[str]] = {}
    for layer, count in train.items():
        sums.setdefault(group(layer), Counter(parameters_train=0)).update(parameters_train=count)
    for layer, counts in own.items():
        sums.setdefault(group(layer), Counter()).update(counts)
    return {name: dict(counts) for name, counts in sums.items() if any(counts.values())}


def _stage_names(model: nn.Module) -> list[str]:
    names = []
    for name, child in model.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList):  # not what is derived from them
            names += [f"{name}.{part}" for part, _ in child.named_children()]
        else:
            names.append(name)
    return names


def _stage_of(layer: str, stages: Sequence[str]) -> str:
    """The stage that a layer is in; "" for what the model does itself."""
    return next((s for s in stages if layer == s or layer.startswith(f"{s}.")), "")


def _paper_columns(name: str, total: Mapping[str, int]) -> Row:
    paper = paper_row(name)
    if paper is None:
        return {}
    columns: Row = {"paper_params_m": paper["params_m"], "paper_mmacs": paper["mmacs"]}
    if paper["params_m"]:
        columns["params_difference"] = 100 * (total["parameters"] / 1e6 / paper["params_m"] - 1)
    if paper["mmacs"]:
        columns["macs_difference"] = 100 * (total["macs"] / 1e6 / paper["mmacs"] - 1)
    return columns


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of softmax(Q Kᵀ) V, from the traced shapes (…, tokens, channels)."""
    query, key, value = (v.type().sizes() for v in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
