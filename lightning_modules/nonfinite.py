"""What happens when a loss is not a number: stop, or leave the step out a few times in a row."""

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.checks import check_loss

__all__ = ["LossGuard"]


class LossGuard:
    """Keeps NaN and infinity out of weights, running statistics and averages.

    Args:
        limit: how many steps in a row may be left out; 0 stops at the first.

    Raises:
        ValueError: `limit` is negative.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"`skip_nonfinite` (={limit}) must be at least 0")
        self.limit = limit
        self._in_a_row = 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def remember(self, model: nn.Module) -> None:
        """Keep the buffers as they are before a batch: its forward pass updates statistics."""
        if not self.limit:
            return
        buffers = list(model.buffers())
        if [id(buffer) for buffer, _ in self._kept] != [id(buffer) for buffer in buffers]:
            self._kept = [(buffer, torch.empty_like(buffer)) for buffer in buffers]
        for buffer, copy in self._kept:
            copy.copy_(buffer)

    def skips(self, loss: Tensor, strategy: Strategy, *, step: int, epoch: int, lr: float) -> bool:
        """Whether to leave this step out, on all ranks alike; the buffers are put back then.

        Args:
            loss: of this rank, a scalar.
            strategy: asks the other ranks.
            step: optimizer steps so far, for the message.
            epoch: for the message.
            lr: for the message.

        Raises:
            FloatingPointError: the loss is not finite, and the limit is reached.
        """
        if not self.limit:
            check_loss(loss, step=step, epoch=epoch, lr=lr)
            return False
        finite = bool(torch.isfinite(loss))
        if strategy.reduce_boolean_decision(finite, all=True):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        for buffer, copy in self._kept:
            buffer.copy_(copy)
        if self._in_a_row > self.limit:
            check_loss(loss, step=step, epoch=epoch, lr=lr)
            raise FloatingPointError(f"the loss of another rank is not finite at step {step}")
        rank_zero_warn(
            f"step {step} (epoch {epoch}) is left out: its loss is not finite "
            f"({self._in_a_row} in a row, at most {self.limit} are)"
        )
        return True
