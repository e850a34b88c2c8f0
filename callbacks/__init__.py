"""Lightning callbacks that work for any reparameterizable timm model.

- `EMA`: averaged weights, which are validated and shipped.
- `Curriculum`: image size and augmentation strength by epoch.
- `ReparameterizeOnSave`: a checkpoint and its fused artifact at every validation.
- `Snapshots`: the state between validations, for a run that is interrupted.
- `Report`: curves, sample predictions and the worst images.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from callbacks.artifacts.callback import ReparameterizeOnSave as ReparameterizeOnSave
    from callbacks.curriculum import Curriculum as Curriculum
    from callbacks.ema import EMA as EMA
    from callbacks.report.callback import Report as Report
    from callbacks.snapshots import Snapshots as Snapshots

_MODULES = {
    "EMA": "callbacks.ema",
    "Curriculum": "callbacks.curriculum",
    "ReparameterizeOnSave": "callbacks.artifacts.callback",
    "Report": "callbacks.report.callback",
    "Snapshots": "callbacks.snapshots",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for: the package alone loads no torch (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
