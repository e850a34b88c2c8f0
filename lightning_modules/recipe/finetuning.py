"""What fine-tuning adds: weights from a file, a new head, parts that do not train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.models import load_state_dict as read_weights
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobileone import MobileOne, calibrate, expand
from mobileone.io.safe_pickle import explain_refusal
from mobileone.weights import convert_keys, identify

__all__ = [
    "first_training_images",
    "freeze",
    "load_start",
    "recalibrate_bn_before_fit",
    "set_frozen_bn_eval",
]

_CALIBRATION_IMAGES = 512
_LOST = (
    "the weights are fused: the branches and BatchNorm's statistics of their training are lost. "
)


def load_start(model: nn.Module, file: str, expand_fused: bool) -> bool:
    """Start from a weight file: timm's, Apple's or our own, in training form or fused.

    A head of other classes stays as it was initialized. Nothing but tensors is read.

    Args:
        model: timm's or ours, freshly built; loaded in place.
        file: `.pth`, `.safetensors` or a training checkpoint (its averaged weights).
        expand_fused: give fused weights of a MobileOne branches again (`mobileone.expand`);
            otherwise the model takes the fused form.

    Returns:
        Whether the weights were expanded, so that `recalibrate_bn_before_fit` has to follow.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds other objects than tensors, or weights of another model.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no weights at {file} (--model.weights)")
    try:
        weights = _network(read_weights(file, weights_only=True))
    except Exception as error:
        raise explain_refusal(Path(file), file, error) from None
    weights, dropped = _without_other_head(model, weights)
    fused = isinstance(model, MobileOne) and _is_fused(weights, expand_fused)
    try:
        if isinstance(model, MobileOne) and fused and expand_fused:
            weights = expand(model, weights)
        missing, unexpected = model.load_state_dict(weights, strict=not dropped)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the weights of {file} do not fit: {error}") from error
    if unexpected or set(missing) != set(dropped):
        raise ValueError(
            f"the weights of {file} do not fit: they lack {sorted(set(missing) - set(dropped))[:3]}"
            f" and hold {list(unexpected)[:3]}, unknown to the model"
        )
    new = f"; the head ({', '.join(dropped)}) is new: it has other classes" if dropped else ""
    rank_zero_info(f"starting from the weights of {file}{new}")
    return fused and expand_fused


def recalibrate_bn_before_fit(model: nn.Module, trainer: Trainer, device: torch.device) -> None:
    """Measure the BatchNorm statistics of expanded weights on the first training images.

    Args:
        model: what `load_start` has expanded.
        trainer: of a fit; its data module gives the images, a share of them to each process.
        device: where the model is.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:
        rank_zero_warn(
            "the expanded weights were not calibrated: the trainer has no data module to take "
            "images from: set model.freeze_bn true, or call mobileone.calibrate before the fit"
        )
        return
    images = first_training_images(data, next(model.parameters()).to(device))
    strategy = trainer.strategy
    calibrate(model, images, lambda total: strategy.reduce(total, reduce_op="mean"))
    rank_zero_info(
        f"BatchNorm's statistics were measured on {sum(map(len, images))} training images a "
        "process: the expanded network trains from the function of the fused one"
    )


def first_training_images(data: Any, like: Tensor) -> list[Tensor]:
    """Batches of 512 training images in all, or somewhat more, or all that there are.

    Args:
        data: a data module; its loader gives each process its share.
        like: a tensor of the type and on the device that they should have.
    """
    batches: list[Tensor] = []
    for batch in data.train_dataloader():
        batches.append(batch[0].to(like))
        if sum(map(len, batches)) >= _CALIBRATION_IMAGES:
            break
    return batches


def freeze(model: nn.Module, parts: Sequence[str], norms: bool) -> None:
    """Let parts of a model stay as they are.

    Args:
        model: its parameters lose `requires_grad`.
        parts: names of submodules, for example `["stem", "stages.0"]`.
        norms: freeze every BatchNorm, scale and shift included.

    Raises:
        ValueError: there is no such part, or nothing would be left to train.
    """
    names = dict(model.named_modules())
    for part in parts:
        if part not in names or not part:
            known = [n for n in names if n and n.count(".") < 2 and n.split(".")[-1] != "act"][:12]
            raise ValueError(
                f"`freeze` names {part!r}, which this model has not; it has {', '.join(known)} …"
            )
        names[part].requires_grad_(False)
    if norms:
        for module in names.values():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`freeze` (={list(parts)}) leaves no parameter to train")


def set_frozen_bn_eval(model: nn.Module) -> None:
    """Put the BatchNorms without trainable parameters in eval mode: their statistics stay."""
    for module in model.modules():
        own = list(module.parameters()) if isinstance(module, _BatchNorm) else []
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _network(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's entries: a checkpoint has those of the metrics too."""
    inside = {k: v for k, v in state.items() if k.startswith("model.")}
    return convert_keys(inside or state)


def _without_other_head(
    model: nn.Module, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Leave the classifier out where its shape is another; returns the names left out."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier") or ""
    own = {k: v for k, v in model.state_dict().items() if isinstance(name, str) and name}
    head = [k for k in own if k.startswith(f"{name}.")]
    if all(k in weights and weights[k].shape == own[k].shape for k in head):
        return weights, []
    return {k: v for k, v in weights.items() if not k.startswith(f"{name}.")}, head


def _is_fused(weights: dict[str, Tensor], expand_fused: bool) -> bool:
    """Whether they are fused; warns what that means."""
    found = identify(weights)
    if found is None or not found.fused:
        return False
    rank_zero_warn(
        f"{_LOST}They are expanded into branches that compute the same, and the statistics are "
        "measured on training images when a fit begins"
        if expand_fused
        else f"{_LOST}The network trains in fused form, without BatchNorm and "
        "over-parameterization: keep the learning rate low, or set model.expand_fused true"
    )
    return True
