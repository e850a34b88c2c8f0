"""Registration of the family with timm, in place of timm's own entries of the same names."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, byobnet, generate_default_cfgs, register_model
from torch import nn

from mobileone.model import MobileOne, checkpoint_filter_fn
from mobileone.variants import VARIANTS, Variant

__all__: list[str] = []

_UNPUBLISHED: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": ("stem.conv_kxk.0.conv", "stem.conv_scale.conv"),
    "classifier": "head.fc",
}

# tags, hub ids and test-time transforms of the published weights stay timm's own
default_cfgs = {
    name: byobnet.default_cfgs[name]
    if name in byobnet.default_cfgs
    else generate_default_cfgs({name: _UNPUBLISHED})[name]
    for name in VARIANTS
}


def _entrypoint(name: str, variant: Variant) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            partial(MobileOne, variant),
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"flatten_sequential": True},
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build {name} with timm's keyword arguments; see `MobileOne`."
    return create


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"Overwriting mobileone_\w+ in registry")
    for _name, _variant in VARIANTS.items():
        globals()[_name] = register_model(_entrypoint(_name, _variant))
