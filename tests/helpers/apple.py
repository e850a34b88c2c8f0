"""Weights under the names of Apple's release."""

import re

__all__ = ["as_apple"]

NAMES = {
    "identity": "rbr_skip",
    "conv_scale": "rbr_scale",
    "conv_kxk": "rbr_conv",
    "attn.fc1": "se.reduce",
    "attn.fc2": "se.expand",
    "head.fc": "linear",
}


def as_apple(state_dict):
    """Rename timm's keys to Apple's, the inverse of the product's map."""
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(r"^stem", "stage0", key)
        key = re.sub(r"^stages\.(\d)", lambda m: f"stage{int(m[1]) + 1}", key)
        for ours, theirs in NAMES.items():
            key = key.replace(f"{ours}.", f"{theirs}.")
        renamed[key] = value
    return renamed
