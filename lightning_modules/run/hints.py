"""Hints at the start of a fit: what often makes a first training on few or small images fail."""

import math
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.dry_run import is_dry_run
from callbacks.ema import EMA
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.optimizers import effective_batch_size

__all__ = ["Hints"]

_PAPER = 0.1 / 256  # learning rate for an image of a step; arXiv 2206.04040, section 4.1
_TOO_FAST = 4  # times that
_TOO_MUCH = 0.1  # share of the first weights in the last average
_WARM = 1000  # updates after which a warm-up has forgotten them


class Hints(Callback):
    """Print a line for each choice that does not suit the data."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print them."""
        if not is_dry_run(trainer):
            texts = _classes(trainer), _pixels(trainer, pl_module), _rate(trainer, pl_module)
            for text in filter(None, (*texts, _average(trainer))):
                print(f"hint: {text}")


def _classes(trainer: Trainer) -> str | None:
    names: Sequence[str] = getattr(cast(Any, trainer).datamodule, "class_names", ())
    if len(names) != 1:
        return None
    return (
        f"{names[0]!r} is the only class, so that every answer is right: each class needs a folder "
        "of its own in train/ and val/"
    )


def _pixels(trainer: Trainer, module: LightningModule) -> str | None:
    info = getattr(getattr(module, "model", None), "feature_info", None)
    config = getattr(cast(Any, trainer).datamodule, "data_config", None)
    if not info or not config:
        return None
    side, stride = min(config["input_size"][1:]), info[-1].get("reduction", 0)
    if side >= stride:
        return None
    return (
        f"images of {side} pixels are smaller than the network's stride, {stride}: "
        f"--data.input_size {2 * stride} enlarges them"
    )


def _rate(trainer: Trainer, module: LightningModule) -> str | None:
    h = module.hparams
    if not isinstance(module, ImageClassifier) or h["optimizer"] not in ("momentum", "sgd"):
        return None
    try:
        batch = effective_batch_size(trainer)
    except ValueError:  # a loader of the user's own that does not say
        return None
    if (
        h["quantize"]
        or h["lr_reference_batch"]
        or h["warmup_epochs"]
        or h["lr"] < _TOO_FAST * _PAPER * batch
    ):
        return None
    return (
        f"learning rate {h['lr']:g} is high for batches of {batch}, for the paper has 0.1 for 256: "
        "--model.lr_reference_batch 256 scales it, --model.warmup_epochs 5 begins lower"
    )


def _average(trainer: Trainer) -> str | None:
    ema = next((c for c in cast(Any, trainer).callbacks if isinstance(c, EMA)), None)
    if ema is None or ema.validate != "average":
        return None
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes during the training
        return None
    updates = steps - ema.start_step
    share = math.prod(ema.decay_at(n) for n in range(int(min(updates, _WARM))))
    share *= ema.decay ** max(0, updates - _WARM)
    if updates <= 0 or share <= _TOO_MUCH:
        return None
    return (
        f"after all {steps} steps the average of the weights still holds {share:.0%} of the first "
        "ones: --ema.warmup true, or a smaller --ema.decay"
    )
