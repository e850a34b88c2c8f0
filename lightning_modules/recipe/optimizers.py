"""The optimizer by timm's names, and what its learning rate refers to."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn
from torch.optim import Optimizer

from mobileone.io.suggest import did_you_mean

__all__ = ["build_optimizer", "effective_batch_size", "steps_per_epoch", "total_steps"]


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    no_decay_norm_bias: bool = False,
    layer_decay: float | None = None,
    optimizer_kwargs: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Make timm's optimizer `name` for the trainable parameters of `model`.

    timm's `"momentum"` is SGD with plain momentum; its `"sgd"` is Nesterov's. Parameters that the
    model itself exempts (`model.no_weight_decay()`) never decay.

    Args:
        model: its parameters with `requires_grad` are optimized.
        name: one of `timm.optim.list_optimizers()`.
        lr: learning rate of all groups.
        weight_decay: weight decay of the groups that decay.
        momentum: used by the optimizers that have one.
        no_decay_norm_bias: no decay for parameters of one dimension (norms, biases).
        layer_decay: factor of the learning rate from each layer to the one before, by the layers
            that timm knows of the model; None for one learning rate.
        optimizer_kwargs: further arguments of the optimizer.

    Raises:
        ValueError: `name` is unknown, and the message lists similar names; or the optimizer does
            not take its arguments.
    """
    further = dict(optimizer_kwargs or {})
    known = [str(known_name) for known_name in list_optimizers()]
    if name.lower().split("_")[-1] not in known:
        hint = did_you_mean(name, known) or "; timm.optim.list_optimizers() has all names"
        raise ValueError(f"unknown `optimizer` (={name!r}){hint}")
    valid = _further_arguments(name)
    for key in further:
        if valid and key not in valid:
            raise ValueError(
                f"`optimizer_kwargs` (={further}) has {key!r}, which {name} does not take there "
                f"(valid names: {', '.join(valid)}); learning rate, weight decay and momentum are "
                "options of their own"
            )
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            filter_bias_and_bn=no_decay_norm_bias,
            layer_decay=layer_decay,
            **further,
        )
    except (TypeError, ValueError) as error:
        if not further:
            raise
        raise ValueError(
            f"{name} does not take `optimizer_kwargs` (={further}): {error}"
        ) from error
    for group in optimizer.param_groups:  # which timm leaves to its own schedulers
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


def _further_arguments(name: str) -> list[str]:
    """What an optimizer takes next to our arguments; empty if it does not say."""
    kind = get_optimizer_class(name.lower().split("_")[-1], bind_defaults=False)
    parameters = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return sorted(set(parameters) - {"params", "lr", "weight_decay", "momentum"})


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the complete fit; loads the training data to count the batches.

    Raises:
        ValueError: the trainer runs without end.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(
            f"the schedules need to know how long training is, but max_epochs={trainer.max_epochs} "
            f"and max_steps={trainer.max_steps} give no number of steps: set one of them (with an "
            "iterable data set, `max_steps`)"
        )
    return int(steps)


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps an epoch; Lightning also steps on an epoch's last, incomplete accumulation.

    Raises:
        ValueError: the length of an epoch is unknown, as with an iterable data set.
    """
    if trainer.num_training_batches == math.inf:
        raise ValueError(
            "the length of an epoch is unknown: set `limit_train_batches` to a number of batches"
        )
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def effective_batch_size(trainer: Trainer) -> int:
    """Images an optimizer step: batch per device × devices × accumulated batches.

    Raises:
        ValueError: the training loader does not report its batch size.
    """
    loader = trainer.train_dataloader
    batch_size: int | None = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    if batch_size is None:
        raise ValueError(
            f"the training loader ({type(loader).__name__}) has no `batch_size`, which scaling the "
            "learning rate needs: set `lr_reference_batch: null` and give the final `lr`"
        )
    return batch_size * trainer.world_size * trainer.accumulate_grad_batches
