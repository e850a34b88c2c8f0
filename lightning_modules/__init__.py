"""LightningModule, data module and command line of the training template.

- `ImageClassifier`: any timm classifier with the paper's recipe; a class to inherit from.
- `ImageDataModule`: images and labels, from folders, timm datasets or your own function.

The rooms: `recipe` (what is optimized), `data` (what it sees), `run` (the folder, the trainer,
resume), `inference`, `studies`, `report`, `dense` (optional tasks), `cli` (the command).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.data.datamodule import ImageDataModule as ImageDataModule
    from lightning_modules.recipe.classifier import ImageClassifier as ImageClassifier

_MODULES = {
    "ImageClassifier": "lightning_modules.recipe.classifier",
    "ImageDataModule": "lightning_modules.data.datamodule",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for: the command starts without torch (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
