"""Writing a checkpoint from all ranks, so that it appears complete or not at all."""

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mobileone.io.atomic import publish_file, staging

__all__ = [
    "AtomicCheckpoint",
    "find_nonfinite",
    "find_nonfinite_in_file",
    "on_rank_zero",
    "save_complete",
    "step_in_name",
    "without_raising",
]


def step_in_name(path: Path) -> int:
    """The step that a checkpoint's name states, `…step=000120…`; -1 where it states none."""
    found = re.search(r"step=(\d+)", path.name)
    return int(found[1]) if found else -1


def save_complete(trainer: Trainer, final: Path, weights_only: bool = False) -> None:
    """Write a checkpoint to a temporary name and rename it: Lightning's own move may copy.

    All ranks must call it. What was written is checked first: a checkpoint that nobody can resume
    from must not replace an earlier one.

    Args:
        trainer: its strategy writes the file.
        final: the checkpoint; replaced if it exists.
        weights_only: leave out optimizers, schedules and callbacks.

    Raises:
        RuntimeError: rank 0 could not rename it.
        OSError: rank 0 could not write it; every rank raises.
        FloatingPointError: a weight, statistic or momentum is not finite; every rank raises.
    """
    with contextlib.ExitStack() as stack:
        place = ""
        if trainer.is_global_zero:
            place = str(stack.enter_context(staging(final.parent)))
        staged = Path(trainer.strategy.broadcast(place)) / final.name
        failure = trainer.strategy.broadcast(_write(trainer, staged, final, weights_only))
        if failure:
            raise OSError(failure)
        wrong = on_rank_zero(trainer, lambda: find_nonfinite_in_file(staged))
        if wrong:
            raise FloatingPointError(
                f"{final} is not written, for {wrong} is not finite after step "
                f"{trainer.global_step}: the training has diverged; lower the learning rate or "
                "warm it up, and continue from the last checkpoint"
            )
        failure = on_rank_zero(trainer, lambda: publish_file(staged, final))
    if failure:
        raise RuntimeError(failure)


class AtomicCheckpoint(ModelCheckpoint):
    """Lightning's, but a file appears complete or not at all.

    Lightning's own way writes elsewhere and moves, which across file systems is a copy: a kill or
    a full disk leaves half a file in place of the one before.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As Lightning does; a resumed run already has checkpoints, so no warning is given."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        save_complete(trainer, Path(filepath), self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath


def _write(trainer: Trainer, staged: Path, final: Path, weights_only: bool) -> str | None:
    """Write, and reach the barrier of all ranks even if that fails; the error, as a line."""
    try:
        trainer.save_checkpoint(staged, weights_only)
    except OSError as error:
        trainer.strategy.barrier("Trainer.save_checkpoint")  # the others are waiting there
        return (
            f"{final} could not be written ({error.strerror or error}); "
            f"{shutil.disk_usage(final.parent).free / 1e6:.0f} MB are free there. The "
            "checkpoints before it are complete: make room, then continue from the last"
        )
    return None


def without_raising(work: Callable[[], str | None]) -> str | None:
    """Run `work`; what went wrong, as a line."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def on_rank_zero(trainer: Trainer, work: Callable[[], str | None]) -> str | None:
    """Run `work` on rank 0; every rank gets what went wrong, so that all continue or all stop."""
    failure = without_raising(work) if trainer.is_global_zero else None
    return trainer.strategy.broadcast(failure)


# other parts may hold infinity by right: the score of a best checkpoint that is still to come
_PARTS = ("state_dict", "current_model_state", "optimizer_states")


def find_nonfinite(checkpoint: Mapping[str, Any]) -> str | None:
    """The name of the first weight, statistic or momentum that is NaN or infinite, or None."""
    for part in _PARTS:
        for name, tensor in _tensors(checkpoint.get(part), part):
            if not bool(tensor.isfinite().all()) and not _is_mask(tensor):
                return name
    return None


def find_nonfinite_in_file(path: Path) -> str | None:
    """The same of a file that this process has just written; None if Lightning's way is not its."""
    if not path.is_file():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a plugin may write what it likes
        return None
    return find_nonfinite(checkpoint) if isinstance(checkpoint, Mapping) else None


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from _tensors(inner, f"{name}/{key}")


def _is_mask(tensor: Tensor) -> bool:
    """Attention masks are 0 and minus infinity."""
    return not tensor.is_complex() and bool((tensor.isneginf() | (tensor == 0)).all())
