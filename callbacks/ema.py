"""Exponential moving average of the weights; it, or the raw weights, are validated and shipped."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from itertools import chain
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

__all__ = ["EMA", "Validated"]

Validated = Literal["average", "raw"]
"""Which weights are validated, and so which ones ship."""

_Tensors = tuple[Tensor, ...] | list[Tensor]


class EMA(WeightAveraging):
    r"""Average the weights after each optimizer step: `ema ← ema + (1 − d_n) (weights − ema)`.

    The first average is a copy of the weights. `d_n` is `decay` (0.9995 for all variants in the
    MobileOne paper, arXiv 2206.04040, section 4.1) or, with `warmup`,
    `min(decay, (1 + n) / (10 + n))` at the n-th update, so that the first weights, which are
    random, do not dominate an early average: without it, 2,000 steps at 0.9995 still leave them
    a share of 37 %. The paper, with 1.5 million steps, mentions no warm-up.

    Averaged are the parameters and floating-point buffers of the `state_dict`; its integer buffers
    are copied; all else (non-persistent buffers, states of metrics) stays the module's own.

    | where | weights |
    |---|---|
    | in the module while training, and after an exception | raw |
    | in the module in validations during training, and after `fit` | `validate`: the average |
    | `checkpoint["state_dict"]`, weights-only checkpoints too | the same |
    | `checkpoint["current_model_state"]`, for resuming | raw |
    | `checkpoint["averaging_state"]["weights"]`, for resuming | average, if validated is `raw` |

    What is validated is what ships: an artifact is made from the `state_dict`. With
    `validate="raw"` the average is kept for a later look, and a resumed run may validate either.
    Before averaging has begun, the averaged weights are the raw ones. A checkpoint that is loaded
    for anything but `fit` is left as it is.

    Repairs these defects of Lightning 2.6's `WeightAveraging`: a test after `fit` with `ckpt_path`
    sees raw weights; a delayed start validates, and can end with, the initial weights; weights-only
    checkpoints hold raw weights; an exception in validation swaps the two sets; saving after `fit`
    loses the raw weights; integer buffers are averaged; there is no warm-up of the decay.

    Args:
        decay: share of the old average that is kept, in [0, 1].
        warmup: let the decay grow with the number of updates.
        start_step: optimizer steps that are not averaged.
        device: where the average is kept, for example `"cpu"`; by default with the model.
        validate: `average` or `raw`: the weights that are validated during training, that the
            `state_dict` of a checkpoint holds, and that remain in the module after `fit`.

    Raises:
        ValueError: `decay`, `start_step` or `validate` is out of its range.
    """

    def __init__(
        self,
        decay: float = 0.9995,
        warmup: bool = True,
        start_step: int = 0,
        device: str | None = None,
        validate: Validated = "average",
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` (={decay}) must be in [0, 1]")
        if start_step < 0:
            raise ValueError(f"`start_step` (={start_step}) must be at least 0")
        if validate not in get_args(Validated):
            raise ValueError(f"`validate` (={validate!r}) must be one of 'average', 'raw'")
        super().__init__(device=device, multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self.validate = validate
        # The raw weights while the module holds the averaged ones, else None. The average itself is
        # never written to by an exchange, so an exception in the middle of one loses nothing.
        self._raw: dict[str, Tensor] | None = None

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average after the optimizer step of index `step_idx`."""
        return step_idx is not None and step_idx >= self.start_step

    def decay_at(self, updates: int) -> float:
        """Decay of the update that follows `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average when fitting begins."""
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        assert self._average_model is not None
        # read on the host at each step: on a GPU, that would wait for the GPU
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()
        self._latest_update_step = trainer.global_step
        self._raw = None
        self._exchange_for_weights_only_checkpoints(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """As the base class; weights trained in half precision are averaged in single precision."""
        assert self._average_model is not None
        weights = cast(LightningModule, _InTypesOf(pl_module, self._average_model.module))
        super().on_train_batch_end(trainer, weights, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validated weights in the module; keep the raw ones for later checkpoints."""
        self._show_validated(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange the weights while fitting; a plain `trainer.validate` takes what is there."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_validated(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the raw weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_raw(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Go back to the raw weights if the exception came in a validation while fitting."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_raw(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the validated weights in `state_dict`, the raw ones in `current_model_state`."""
        if self._average_model is None:
            return
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = {**state, **(self._raw or {})}
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}
        if not self._has_average():
            return
        average = {**state, **_weights(self._average_model.module)}
        if self.validate == "average":
            checkpoint["state_dict"] = average
        else:
            checkpoint["averaging_state"]["weights"] = average

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On resuming, take up both sets. Otherwise the module already has what it needs."""
        if trainer.state.fn != TrainerFn.FITTING:
            # the module's weights are no longer those of the last fit
            self._average_model = self._raw = None
            return
        assert self._average_model is not None
        strict = pl_module.strict_loading
        average = checkpoint.get("averaging_state", {}).get("weights", checkpoint["state_dict"])
        self._average_model.module.load_state_dict(average, strict=strict)
        if "averaging_state" not in checkpoint:
            rank_zero_warn(
                "the checkpoint was saved without EMA: averaging starts from its weights"
            )
            return
        self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=strict)

    def _average(
        self,
        average: _Tensors,
        weights: _Tensors,
        updates: int | Tensor,  # same device and type
    ) -> None:
        if not average[0].is_floating_point() and not average[0].is_complex():
            torch._foreach_copy_(average, weights)
            return
        assert self._average_model is not None
        share = 1 - self.decay_at(int(self._average_model.n_averaged))
        torch._foreach_lerp_(average, weights, share)

    def _has_average(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def _show_validated(self, pl_module: LightningModule) -> None:
        if self.validate == "average" and self._raw is None and self._has_average():
            assert self._average_model is not None
            self._raw = {name: weight.clone() for name, weight in _weights(pl_module).items()}
            _copy(_weights(self._average_model.module), pl_module)

    def _show_raw(self, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _copy(self._raw, pl_module)
            self._raw = None

    @contextmanager
    def _validated(self, pl_module: LightningModule) -> Iterator[None]:
        was_shown = self._raw is not None
        self._show_validated(pl_module)
        try:
            yield
        finally:
            if not was_shown:
                self._show_raw(pl_module)

    def _exchange_for_weights_only_checkpoints(self, trainer: Trainer) -> None:
        # Lightning calls no hook of a callback for a weights-only checkpoint
        if "save_checkpoint" in vars(trainer):
            return  # done in an earlier fit of this trainer
        save = trainer.save_checkpoint

        @wraps(save)
        def save_checkpoint(
            filepath: Any, weights_only: bool | None = None, storage_options: Any = None
        ) -> None:
            with self._validated(trainer.lightning_module) if weights_only else nullcontext():
                save(filepath, weights_only, storage_options)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


class _InTypesOf:
    """The tensors of a module in the types of another's, where they differ as copies."""

    def __init__(self, module: nn.Module, like: nn.Module) -> None:
        self._module, self._like = module, like

    def parameters(self) -> Iterator[Tensor]:
        pairs = zip(self._module.parameters(), self._like.parameters(), strict=True)
        return (tensor.to(like.dtype) for tensor, like in pairs)

    def buffers(self) -> Iterator[Tensor]:
        pairs = zip(self._module.buffers(), self._like.buffers(), strict=True)
        return (tensor.to(like.dtype) for tensor, like in pairs)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are in the state dict, detached; no states of metrics."""
    saved = module.state_dict().keys()
    tensors = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors if name in saved}


@torch.no_grad()
def _copy(weights: dict[str, Tensor], module: nn.Module) -> None:
    for name, target in _weights(module).items():
        target.copy_(weights[name])
