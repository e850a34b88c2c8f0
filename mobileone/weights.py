"""Weight files of every origin: key maps and the recognition of a variant.

Known layouts are timm's (ours), Apple's (`stage1.0.rbr_conv…`), each in training and in fused
form, and any of them below the prefixes of wrappers: a LightningModule that holds the network as
`model`, `DistributedDataParallel`, `torch.compile`, in any order.
"""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from mobileone.block import FusedMobileOneBlock, MobileOneBlock
from mobileone.variants import VARIANTS

__all__ = ["WeightsInfo", "adapt_on_load", "check_strictly", "convert_keys", "identify"]

_APPLE_TO_TIMM = (
    (re.compile(r"^stage0\."), "stem."),
    (re.compile(r"^stage([1-4])\."), lambda m: f"stages.{int(m[1]) - 1}."),
    (re.compile(r"(^|\.)rbr_skip\."), r"\1identity."),
    (re.compile(r"(^|\.)rbr_scale\."), r"\1conv_scale."),
    (re.compile(r"(^|\.)rbr_conv\."), r"\1conv_kxk."),
    (re.compile(r"(^|\.)se\.reduce\."), r"\1attn.fc1."),
    (re.compile(r"(^|\.)se\.expand\."), r"\1attn.fc2."),
    (re.compile(r"^linear\."), "head.fc."),
)
_WRAPPERS = ("model.", "module.", "_orig_mod.")
_FUSED = "reparam_conv.weight"
_CONV = rf"(?:conv_kxk\.0\.conv|{_FUSED[: -len('.weight')]})\.weight"


@dataclass(frozen=True)
class WeightsInfo:
    """What a state dict holds, read from its keys and shapes.

    Attributes:
        variant: Name in the family, or None if the layout is not one of its rows.
        fused: Whether any of the blocks is folded.
        num_classes: Rows of the classifier, or None without one.
        in_chans: Channels of the input images.
    """

    variant: str | None
    fused: bool
    num_classes: int | None
    in_chans: int

    def __str__(self) -> str:
        name = self.variant or "a MobileOne of an unknown layout"
        form = "fused" if self.fused else "training form"
        classes = "no classifier" if self.num_classes is None else f"{self.num_classes} classes"
        return f"{name} ({form}, {classes}, {self.in_chans} input channels)"


def convert_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a known layout to timm's; keys of timm's own layout stay.

    Args:
        state_dict: Weights of a complete MobileOne.

    Returns:
        The same tensors under timm's names.
    """
    converted = dict(state_dict)
    while wrapper := next((w for w in _WRAPPERS if any(k.startswith(w) for k in converted)), None):
        inside = {k: v for k, v in converted.items() if k.startswith(wrapper)}
        converted = {k[len(wrapper) :]: v for k, v in inside.items()}
    if not any(key.startswith("stage0.") for key in converted):
        return converted
    return {_timm_key(key): value for key, value in converted.items()}


def identify(state_dict: Mapping[str, Any]) -> WeightsInfo | None:
    """Recognize which MobileOne a state dict of timm's layout belongs to.

    Args:
        state_dict: Weights under timm's names; see `convert_keys`.

    Returns:
        What it holds, or None if it is not a MobileOne's.
    """
    stem = next((v for k, v in state_dict.items() if re.match(rf"^stem\.{_CONV}$", k)), None)
    if stem is None:
        return None
    classifier = state_dict.get("head.fc.weight")
    return WeightsInfo(
        variant=_variant_of(state_dict),
        fused=_any_folded(state_dict),
        num_classes=None if classifier is None else classifier.shape[0],
        in_chans=stem.shape[1],
    )


def _timm_key(key: str) -> str:
    for pattern, replacement in _APPLE_TO_TIMM:
        key = pattern.sub(replacement, key)
    return key


def _any_folded(state_dict: Mapping[str, Any]) -> bool:
    return any(key.endswith(f".{_FUSED}") for key in state_dict)


def _variant_of(state_dict: Mapping[str, Any]) -> str | None:
    depths, widths, branches = [0] * 4, [0] * 4, 1
    for key, value in state_dict.items():
        if (found := re.match(rf"^stages\.([0-3])\.(\d+)\.{_CONV}$", key)) is None:
            if branch := re.match(r"^stages\.\d+\.\d+\.conv_kxk\.(\d+)\.conv\.weight$", key):
                branches = max(branches, int(branch[1]) + 1)
            continue
        stage, unit = int(found[1]), int(found[2])
        if unit // 2 + 1 >= depths[stage]:
            depths[stage] = unit // 2 + 1
            if unit % 2:
                widths[stage] = value.shape[0]
    fused = _any_folded(state_dict)
    for name, row in VARIANTS.items():
        same_branches = fused or row.num_conv_branches == branches
        if (row.depths, row.widths) == (tuple(depths), tuple(widths)) and same_branches:
            return name
    return None


_FOLDED = ("reparam_conv.weight", "reparam_conv.bias")
_BRANCH = "conv_kxk.0.conv.weight"
_BRANCHES = ("conv_kxk.", "conv_scale.", "identity.")


def check_strictly(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse what a strict load will refuse, while the model still has its old form.

    Args:
        model: The MobileOne that will load.
        state_dict: Its weights, in any known layout.

    Raises:
        RuntimeError: The weights do not fit; reports what they are.
    """
    weights = convert_keys(state_dict)
    _refuse_misfit(model, weights, _folded_blocks(model, weights), strict=True)


def adapt_on_load(
    model: nn.Module,
    state_dict: MutableMapping[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Prepare weights and model for one another; a hook of `nn.Module.load_state_dict`.

    Missing and additional keys are left to torch. Foreign weights, differing shapes and a partly
    folded file are refused, strict or not.

    Args:
        model: The MobileOne that loads; its blocks are replaced if the weights are fused.
        state_dict: The weights, renamed in place.
        prefix: Prefix of the model's keys in the module that loads.
        local_metadata: Unused; part of torch's hook signature, like all that follow.
        strict: Unused: True in every call of torch's.
        missing_keys: Unused.
        unexpected_keys: Unused.
        error_msgs: Unused: torch would bury the explanation under a line for every key.

    Raises:
        RuntimeError: The weights do not fit; reports what they are. The model is unchanged.
    """
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    weights = convert_keys(own)
    for key in own:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in weights.items()})

    folded = _folded_blocks(model, weights)
    _refuse_misfit(model, weights, folded, strict=False)
    for name, block in folded.items():
        model.set_submodule(name, block)


def _folded_blocks(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, FusedMobileOneBlock]:
    """Folded counterparts of the model's blocks, all of them, if the weights hold any folded."""
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, MobileOneBlock)}
    if not any(f"{name}.{key}" in weights for name in blocks for key in _FOLDED):
        return {}
    return {name: block.empty_fused() for name, block in blocks.items()}


def _refuse_misfit(
    model: nn.Module,
    weights: Mapping[str, Any],
    folded: Mapping[str, FusedMobileOneBlock],
    strict: bool,
) -> None:
    """Raise if the weights do not fit the model once its blocks are `folded`."""
    if not weights:
        return  # torch lists the missing keys
    parameters = dict(model.named_parameters())
    target = _with_folded_blocks(parameters, folded)
    tensors = {**target, **dict(model.named_buffers())}
    unlike = _first_unlike_shape(weights, tensors)
    found, expected = identify(weights), identify(parameters)

    misfit = None
    if found is None:
        # what remains is a deliberate part of a model, such as its head
        if strict or unlike is not None or any(key not in tensors for key in weights):
            misfit = (
                "the weights are not a MobileOne's: they have no stem; this model is "
                f"{expected or 'a MobileOne'}"
            )
    elif expected is not None:
        misfit = _explain_layout(found, expected, strict, unlike)
    misfit = misfit or _explain_form(model, weights, folded)
    if misfit is None and folded and strict:
        misfit = _explain_keys(weights, target, tensors)
    if misfit is not None:
        raise RuntimeError(misfit)


def _explain_layout(
    found: WeightsInfo, expected: WeightsInfo, strict: bool, unlike: str | None
) -> str | None:
    """A differing shape, or with `strict` a differing row of the family."""
    same_classes = found.num_classes in (None, expected.num_classes) or expected.num_classes is None
    same = (
        found.variant == expected.variant and found.in_chans == expected.in_chans and same_classes
    )
    if unlike is None and (same or not strict):
        return None
    if same:
        return f"the weights look like {found}, as this model does, but {unlike}"
    fix = ""
    if found.variant is not None:
        fix = (
            f"; create timm.create_model({found.variant!r}, num_classes={found.num_classes or 0}, "
            f"in_chans={found.in_chans}) for them"
        )
    return f"the weights look like {found}, but this model is {expected}{fix}"


def _explain_form(
    model: nn.Module,
    weights: Mapping[str, Any],
    folded: Mapping[str, FusedMobileOneBlock],
) -> str | None:
    """Blocks folded on one side only, or in part."""
    modules = dict(model.named_modules())
    fused = [n for n, m in modules.items() if isinstance(m, FusedMobileOneBlock)]
    if any(f"{name}.{_BRANCH}" in weights for name in fused):
        return (
            "the weights are in training form, but this model is fused already: load them into a "
            "fresh model, then call mobileone.reparameterize(model)"
        )
    if branched := [name for name in folded if f"{name}.{_BRANCH}" in weights]:
        return (
            f"the weights mix folded blocks with {len(branched)} in training form "
            f"({_some(branched)}): fold the complete model before saving, or load them into a "
            "model of which the same blocks are folded"
        )
    lacking = [f"{name}.{key}" for name in folded for key in _FOLDED]
    if lacking := [key for key in lacking if key not in weights]:
        return (
            f"the weights are folded, but lack {_some(lacking)}: a folded block needs the kernel "
            "and the bias of its convolution"
        )
    return None


def _explain_keys(
    weights: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> str | None:
    """What torch would complain of, but only after the model had taken the fused form."""
    missing = [key for key in parameters if key not in weights]
    unexpected = [key for key in weights if key not in tensors]
    if not missing and not unexpected:
        return None
    complaints = [f"lack {_some(missing)}"] if missing else []
    complaints += [f"hold {_some(unexpected)}, unknown to this model"] if unexpected else []
    return f"the folded weights {' and '.join(complaints)}; strict=False loads what fits"


def _with_folded_blocks(
    parameters: Mapping[str, Tensor], folded: Mapping[str, FusedMobileOneBlock]
) -> dict[str, Tensor]:
    gone = tuple(f"{name}.{branch}" for name in folded for branch in _BRANCHES)
    kept = {key: value for key, value in parameters.items() if not key.startswith(gone)}
    new = chain.from_iterable(block.named_parameters(prefix=name) for name, block in folded.items())
    return {**kept, **dict(new)}


def _first_unlike_shape(weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    for key, own in tensors.items():
        value = weights.get(key, own)
        # torch takes (1,) for a scalar, as in old files
        if not isinstance(value, Tensor) or (own.ndim and value.shape != own.shape):
            form = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return f"`{key}` is {form} and not {tuple(own.shape)}"
    return None


def _some(names: list[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
