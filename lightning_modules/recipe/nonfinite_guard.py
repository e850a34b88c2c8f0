"""What happens when a loss or a gradient is not a number: stop, or leave the step out."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["NonFiniteGuard", "check_validation_loss"]

_LOWER = (
    "lower `lr`, warm it up (`warmup_epochs`; `warmup_steps` of segment and detect), or train with "
    "precision bf16-mixed in place of 16-mixed"
)
_OF_IMAGES = (
    "some of its images hold NaN or infinity, so that neither weights nor learning rate are at "
    "fault: correct what the data module returns"
)
_ADVICE = (
    f"{_LOWER}, or leave a few such steps out with `skip_nonfinite`; then continue from the last "
    "checkpoint"
)


class NonFiniteGuard:
    """Keeps NaN and infinity out of weights, running statistics and averages.

    A module calls `save_buffers` before the first batch of an optimizer step, hands each loss
    through `check_loss`, and calls `check_gradients` in `on_before_optimizer_step`. A loss that is
    not finite gets gradients that are not, so that where the processes add up their gradients all
    of them learn of it, and all stop or all leave the step out, without a collective of their own.

    Args:
        limit: how many steps in a row may be left out; 0 stops at the first.

    Attributes:
        loss_is_finite: whether the loss that `check_loss` saw last was.

    Raises:
        ValueError: `limit` is negative.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"`skip_nonfinite` (={limit}) must be at least 0")
        self.limit = limit
        self.loss_is_finite = True
        self._lost: float | None = None  # a loss of this step, of this rank
        self._images_finite = True
        self._in_a_row = 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def save_buffers(self, model: nn.Module) -> None:
        """Keep the buffers as they are before a step: its forward passes update statistics."""
        self._lost, self._images_finite = None, True
        if not self.limit:
            return
        buffers = list(model.buffers())
        if [id(buffer) for buffer, _ in self._kept] != [id(buffer) for buffer in buffers]:
            self._kept = [(buffer, torch.empty_like(buffer)) for buffer in buffers]
        for buffer, copy in self._kept:
            copy.copy_(buffer)

    def check_loss(self, loss: Tensor) -> Tensor:
        """Note whether a loss is finite; its gradients are NaN if it is not.

        An infinite loss can have finite gradients, which would hide it from the other ranks.
        """
        self.loss_is_finite = bool(torch.isfinite(loss))
        if self.loss_is_finite:
            return loss
        self._lost = float(loss.detach())
        return loss * torch.nan

    def check_images(self, images: Tensor) -> None:
        """Note whether the images of a loss that is not finite are at fault."""
        self._images_finite &= bool(images.isfinite().all())

    def check_gradients(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients of a step, and drop them if one is not finite.

        An optimizer leaves parameters without gradient as they are, and the buffers are put back:
        nothing of the step remains. With a gradient scaler, infinite gradients of a finite loss are
        its business as long as it can lower its scale: it leaves such steps out itself.

        Args:
            module: under training; asked for its trainer.
            optimizer: whose gradients are complete, unscaled and not yet clipped.

        Raises:
            FloatingPointError: a gradient is not finite, and the limit is reached; on all ranks.
        """
        strategy, distributed = module.trainer.strategy, module.trainer.world_size > 1
        finite = _finite(optimizer)
        if distributed and not isinstance(strategy, DDPStrategy):  # DDP's gradients are the same
            finite = strategy.reduce_boolean_decision(finite, all=True)
        if finite:
            self._in_a_row = 0
            return
        lost = strategy.reduce_boolean_decision(self._lost is not None, all=False)
        images_finite = strategy.reduce_boolean_decision(self._images_finite, all=True)
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        if not lost and scaler is not None and scaler.get_scale() > 1:
            return
        self._in_a_row += 1
        found = self._found(lost)
        if self._in_a_row > self.limit:
            lr = max(float(group["lr"]) for group in optimizer.param_groups)
            raise FloatingPointError(
                f"{found[0]} at step {module.global_step} (epoch {module.current_epoch}, learning "
                f"rate {lr:g}): "
                + (_ADVICE if images_finite else f"{_OF_IMAGES}, or set `skip_nonfinite`")
            )
        optimizer.zero_grad(set_to_none=True)
        for buffer, copy in self._kept:
            buffer.copy_(copy)
        rank_zero_warn(
            f"step {module.global_step} (epoch {module.current_epoch}) is left out: {found[1]} "
            f"not finite ({self._in_a_row} in a row, at most {self.limit} are)"
        )

    def _found(self, lost: bool) -> tuple[str, str]:
        """What is wrong: for the end of a run, and for a step that is left out."""
        if self._lost is not None:
            return f"the loss is {self._lost}", "its loss is"
        if lost:
            return "the loss of another rank is not finite", "its loss, on another rank, is"
        return "the loss is finite, but its gradients are not", "its gradients are"


def check_validation_loss(module: LightningModule, loss: float, finite: Sequence[Tensor]) -> None:
    """Stop a training whose validation has a loss that is not finite.

    Args:
        module: under training; all ranks must call this.
        loss: of the validation, the same on all ranks.
        finite: which images of each batch of this rank are finite, (N,).

    Raises:
        FloatingPointError: it is not.
    """
    if math.isfinite(loss):
        return
    what = f"the validation's loss is {loss} after step {module.global_step}"
    if place := _first_bad_image(module, finite):
        raise FloatingPointError(f"{what}, for {_OF_IMAGES} (the first: {place})")
    raise FloatingPointError(
        f"{what} (epoch {module.current_epoch}): the weights have diverged, and are not saved; "
        f"{_LOWER}, and continue from the last checkpoint"
    )


def _first_bad_image(module: LightningModule, finite: Sequence[Tensor]) -> str | None:
    """Where the first image is that is not finite, of the lowest rank that has met one."""
    bad = ((i, int(images.int().argmin())) for i, images in enumerate(finite) if not images.all())
    mine = torch.tensor(next(bad, (-1, -1)), device=module.device)
    places = module.trainer.strategy.all_gather(mine).reshape(-1, 2).tolist()  # of each rank
    for rank, (batch, image) in enumerate(places):
        if batch >= 0:
            of_rank = f" of rank {rank}" if len(places) > 1 else ""
            return f"image {image} of batch {batch}{of_rank}, counted from 0"
    return None


def _finite(optimizer: Optimizer) -> bool:
    """Whether all gradients are; waits for the device once."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    if not gradients:
        return True
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if wide else torch.float32  # sums in float16 overflow soon
    norms = torch._foreach_norm(gradients, 2, dtype=dtype)
    if bool(torch.stack(norms).isfinite().all()):
        return True
    # the squares overflow before the gradients do; the exact question takes 20 times as long
    return all(bool(gradient.isfinite().all()) for gradient in gradients)
