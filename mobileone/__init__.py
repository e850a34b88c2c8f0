"""MobileOne for timm: importing this package registers the family with `timm.create_model`."""

from mobileone import registration as _registration  # noqa: F401  (registers on import)
from mobileone.block import FusedMobileOneBlock, MobileOneBlock
from mobileone.expansion import calibrate, expand
from mobileone.model import MobileOne
from mobileone.reparameterize import reparameterize, set_collapse

__all__ = [
    "FusedMobileOneBlock",
    "MobileOne",
    "MobileOneBlock",
    "calibrate",
    "expand",
    "reparameterize",
    "set_collapse",
]
