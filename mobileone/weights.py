"""Weight files of every origin: key maps and the recognition of a variant.

Known layouts are timm's (ours), Apple's (`stage1.0.rbr_conv…`), each in training and in fused
form, and any of them below the prefixes of wrappers: a LightningModule that holds the network as
`model`, `DistributedDataParallel`, `torch.compile`, in any order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mobileone.variants import VARIANTS

__all__ = ["WeightsInfo", "convert_keys", "identify"]

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
    """What a state dict holds, as far as its keys and shapes tell.

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
        state_dict: Weights of a whole MobileOne.

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
    """Recognise which MobileOne a state dict of timm's layout belongs to.

    Args:
        state_dict: Weights under timm's names; see `convert_keys`.

    Returns:
        What it holds, or None if it is not a MobileOne's.
    """
    stem = _first(state_dict, rf"^stem\.{_CONV}$")
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


def _first(state_dict: Mapping[str, Any], pattern: str) -> Tensor | None:
    return next((v for k, v in state_dict.items() if re.match(pattern, k)), None)


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
