"""Training against the integer network: checks before it, and the scales it begins with."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.recipe.finetuning import first_training_images
from mobileone.quantization import SCHEMES, calibrate_quantization, quantize

__all__ = [
    "calibrate_quantization_before_fit",
    "check_quantization",
    "check_same_quantization",
    "quantized",
]

_OPTIONS = ("quantize", "quantize_kwargs")


def quantized(model: nn.Module, scheme: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The network that trains as integers; the model itself is changed.

    Args:
        model: timm's or ours, with float weights inside.
        scheme: how weights are rounded.
        kwargs: further arguments of `mobileone.quantization.quantize`.

    Raises:
        ValueError: an argument is unknown, or there is no block to fold.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"`quantize` (={scheme!r}) must be one of {', '.join(SCHEMES)}")
    parameters = inspect.signature(quantize).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if set(kwargs) - set(known):
        raise ValueError(f"`quantize_kwargs` (={dict(kwargs)}) may hold {', '.join(known)}")
    return quantize(model, scheme, **kwargs)


def check_quantization(
    arguments: Mapping[str, Any], *, resumed: bool = False, synchronized: bool = False
) -> None:
    """Make sure that quantized training, if it is one, can start.

    Args:
        arguments: of the classifier.
        resumed: a checkpoint brings the weights.
        synchronized: BatchNorm takes the statistics of all devices.

    Raises:
        ValueError: It starts from random weights, whose BatchNorm statistics mean nothing, or its
            own statistics are one device's.
    """
    if arguments["quantize"] is None:
        return
    statistics = (arguments["quantize_kwargs"] or {}).get("statistics", "frozen")
    if synchronized and statistics != "frozen":
        raise ValueError(
            f"`statistics` (={statistics!r}) of `quantize_kwargs` are those of one device, and "
            "--trainer.sync_batchnorm asks for those of all: set it to false, or choose 'frozen'"
        )
    kwargs = arguments["model_kwargs"] or {}
    if not resumed and not (
        arguments["weights"] or arguments["pretrained"] or kwargs.get("checkpoint_path")
    ):
        raise ValueError(
            f"`quantize` (={arguments['quantize']!r}) starts from a trained network: name its "
            "checkpoint or weight file with --model.weights, or set --model.pretrained true"
        )


def check_same_quantization(own: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint holds the network that is built.

    Args:
        own: arguments of the classifier.
        stored: those in the checkpoint, which may be older than the options.

    Raises:
        ValueError: It was trained in floating point, or with other options.
    """
    for name in _OPTIONS:
        if (own.get(name) or None) != (stored.get(name) or None):
            raise ValueError(
                f"the checkpoint was trained with `{name}` = {stored.get(name)!r}, not "
                f"{own.get(name)!r}: leave the option out to go on with it, or start a new run "
                "from its weights with --model.weights in place of --ckpt_path"
            )


def calibrate_quantization_before_fit(
    model: nn.Module, trainer: Trainer, device: torch.device
) -> None:
    """Find the scales on the first training images.

    Args:
        model: quantized, with trained weights.
        trainer: of a fit; its data module gives the images, a share of them to each process.
        device: where the model is.

    Raises:
        ValueError: the trainer has no data module.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise ValueError(
            "`quantize` finds its scales on training images: fit with a data module, or call "
            "mobileone.quantization.calibrate_quantization before, and load the result"
        )
    images = first_training_images(data, next(model.parameters()).to(device))
    reduce = trainer.strategy.reduce
    known = getattr(data, "data_config", {})
    calibrate_quantization(
        model,
        images,
        lambda extreme: reduce(extreme, reduce_op="max"),
        mean=known.get("mean", ()),
        std=known.get("std", ()),
    )
    rank_zero_info(
        f"the scales of the integer network were found on {sum(map(len, images))} training images "
        "a process"
    )
