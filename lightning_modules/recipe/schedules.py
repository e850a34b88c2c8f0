"""Schedules of learning rate and weight decay: one mechanism and four shapes for both."""

import math
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mobileone.io.suggest import did_you_mean

__all__ = ["Schedule", "ScheduleShape", "check_shape", "schedule_factor"]

ScheduleShape = Literal["cosine", "linear", "step", "constant"]

_MILESTONES = 0.3, 0.6, 0.9


def schedule_factor(
    step: int,
    total_steps: int,
    shape: ScheduleShape = "cosine",
    end: float = 0.0,
    warmup_steps: int = 0,
) -> float:
    r"""Share of its start value that a hyper-parameter has after `step` optimizer steps.

    With warm-up steps `w` and total steps `T`, `f(t) = (t + 1) / (w + 1)` for `t < w`, so that the
    first step of a warm-up already moves the weights. After it, `p = min(1, (t − w) / (T − w))`:

        cosine      f = end + ½ (1 − end) (1 + cos(π p))
        linear      f = end + (1 − end) (1 − p)
        step        f = end^(k / 3), k = how many of 0.3, 0.6 and 0.9 are at most p
        constant    f = 1

    All start from exactly 1 after the warm-up. `step` with `end = 0.001` is the classic × 0.1 at
    30, 60 and 90 % of the training. `constant` does not use `end`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    match shape:
        case "cosine":
            return end + 0.5 * (1 - end) * (1 + math.cos(math.pi * progress))
        case "linear":
            return end + (1 - end) * (1 - progress)
        case "step":
            return float(end ** (sum(progress >= m for m in _MILESTONES) / len(_MILESTONES)))
        case "constant":
            return 1.0


def check_shape(argument: str, shape: str, end: float) -> None:
    """Raise ValueError unless `shape` is a schedule's, and one that can reach `end`.

    Args:
        argument: the name of the user's argument, for the message.
        shape: one of `ScheduleShape`.
        end: value at the end, as a share of the start value.
    """
    shapes = get_args(ScheduleShape)
    if shape not in shapes:
        hint = did_you_mean(shape, shapes)
        raise ValueError(f"`{argument}` (={shape!r}) must be one of {', '.join(shapes)}{hint}")
    if shape == "step" and end <= 0:
        raise ValueError(
            f"`{argument}` (='step') cannot reach an end value of 0 because it multiplies: choose "
            "another schedule, or an end value greater than 0"
        )


class Schedule(LRScheduler):
    r"""Change one hyper-parameter of every parameter group by `schedule_factor`.

    MobileOne (arXiv 2206.04040, appendix on training) anneals the weight decay on the same cosine
    as the learning rate: `wd(t) = 1e-5 + ½ (1e-4 − 1e-5) (1 + cos(π t / T))`. Being a factor, it
    leaves groups that start at 0 (norms and biases without decay) at 0.

    The value is a pure function of the configuration and of the number of steps. Only that number
    is restored from a checkpoint, so a changed configuration takes effect on resuming, and an
    unchanged one continues bit for bit.

    To torch and Lightning it is an `LRScheduler`, whatever `key` it changes: Lightning steps, saves
    and resumes it, and no `lr_scheduler_step` hook is needed.

    Args:
        optimizer: optimizer whose parameter groups are changed.
        key: entry of the parameter groups, `"lr"` or `"weight_decay"`.
        total_steps: optimizer steps until the end value is reached, warm-up included.
        shape: of the way from the start value to the end value.
        end: value at the end, as a share of the start value.
        warmup_steps: optimizer steps of linear increase before it.

    Raises:
        ValueError: a group lacks `key`, the shape is unknown, or the lengths do not fit each other.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
        >>> Schedule(optimizer, "weight_decay", total_steps=1000, end=0.1)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        key: str,
        total_steps: int,
        shape: ScheduleShape = "cosine",
        end: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        check_shape("shape", shape, end)
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"`warmup_steps` (={warmup_steps}) must be at least 0 and less than "
                f"`total_steps` (={total_steps}): shorten the warm-up or train for longer"
            )
        for group in optimizer.param_groups:
            if key not in group:
                raise ValueError(
                    f"`key` (={key!r}) is not in the parameter groups of "
                    f"{type(optimizer).__name__}, which have {sorted(set(group) - {'params'})}"
                )
        self.key = key
        self.total_steps = total_steps
        self.shape: ScheduleShape = shape
        self.end = end
        self.warmup_steps = warmup_steps
        self.start_values = [group[key] for group in optimizer.param_groups]
        super().__init__(optimizer)  # calls step() once, which moves last_epoch from -1 to 0

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step, or to step `epoch`, and set the groups' values."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        factor = schedule_factor(
            self.last_epoch, self.total_steps, self.shape, self.end, self.warmup_steps
        )
        for group, start in zip(self.optimizer.param_groups, self.start_values, strict=True):
            group[self.key] = start * factor

    def get_last_lr(self) -> list[Any]:
        """Learning rates now in the groups, also where `key` is another hyper-parameter."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """Steps taken and, to notice a change on resuming, the length of the schedule."""
        return {"last_epoch": self.last_epoch, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved step of this configuration's schedule; warn if its length has changed.

        The groups' values are set again, because the optimizer's own state holds the values of the
        run that saved it.
        """
        if state_dict["total_steps"] != self.total_steps:
            rank_zero_warn(
                f"the checkpoint's schedule of `{self.key}` has {state_dict['total_steps']} steps, "
                f"this run's has {self.total_steps}: continuing at step "
                f"{state_dict['last_epoch']} of this run's"
            )
        self.step(state_dict["last_epoch"])
