"""Training of any timm classifier, with the recipe of the MobileOne paper as defaults."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Protocol, runtime_checkable

import timm
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

import mobileone  # noqa: F401  (registers the family with timm)
from callbacks.dry_run import is_dry_run
from lightning_modules.checks import check_checkpoint_classes, check_targets
from lightning_modules.recipe.distillation import Teacher, check_distillation
from lightning_modules.recipe.finetuning import freeze as freeze_parts
from lightning_modules.recipe.finetuning import (
    load_start,
    recalibrate_bn_before_fit,
    set_frozen_bn_eval,
)
from lightning_modules.recipe.metrics import (
    MetricNames,
    basic_metrics,
    collect,
    mean_metric,
    named_metrics,
)
from lightning_modules.recipe.mixing import make_mixing
from lightning_modules.recipe.nonfinite_guard import check_validation_loss
from lightning_modules.recipe.optimizers import (
    build_optimizer,
    effective_batch_size,
    steps_per_epoch,
)
from lightning_modules.recipe.quantizing import (
    calibrate_quantization_before_fit,
    check_quantization,
    check_same_quantization,
    quantized,
)
from lightning_modules.recipe.schedules import Schedule, ScheduleShape, check_shape
from lightning_modules.recipe.training_module import TrainingModule
from mobileone import set_collapse
from mobileone.collapsed import CollapseMode
from mobileone.export.spec import ExportSpec

__all__ = ["ImageClassifier"]


@runtime_checkable
class _ClassifiedData(Protocol):
    class_names: list[str]
    data_config: dict[str, Any]


_STEP_LR_END = 1e-3  # × 0.1 at each of the three steps


class ImageClassifier(TrainingModule):
    r"""Classify images with a timm model; batches are `(images, targets)`.

    The network is `self.model`, a timm model: images (N, C, H, W) -> logits (N, num_classes).

    The defaults are the recipe of MobileOne (arXiv 2206.04040, section 4.1): SGD with momentum,
    learning rate 0.1 for an effective batch of 256 on a cosine, label smoothing 0.1, weight decay
    annealed from 1e-4 to 1e-5 on the same cosine. The paper states neither the momentum (0.9 in
    reproductions), nor a warm-up (none here), nor whether norms and biases decay (they do here),
    nor whether annealing goes by step or epoch (by step here). The average of the weights is the
    `EMA` callback's.

    Logs `train/loss` (this step's, with smoothing), `train/loss_epoch`, `lr`, `weight_decay`, and
    `loss` (cross-entropy without smoothing, whatever the training's loss), `acc1`, with more than
    five classes `acc5`, and what `metrics` names, under `val/` and `test/`. These are exact for
    uneven batches and over several devices.

    To change more than arguments can, override `make_loss`, `make_schedules`, `make_metrics` or
    `make_optimizer` in a subclass. Its own arguments are in `self.hparams`, also while
    `super().__init__` runs:

        >>> class FocalClassifier(ImageClassifier):
        ...     def __init__(self, *args, gamma: float = 2.0, **kwargs):
        ...         super().__init__(*args, **kwargs)
        ...
        ...     def make_loss(self):
        ...         return partial(focal_loss, gamma=self.hparams["gamma"])

    Args:
        model: timm name, for example `mobileone_s0` or `repvgg_a0.rvgg_in1k`.
        num_classes: number of logits.
        in_chans: channels of the images.
        model_kwargs: further arguments of `timm.create_model`, for example `{"drop_rate": 0.1}`.
        pretrained: start from timm's weights; not repeated when a checkpoint is loaded.
        weights: start from this file instead: timm's, Apple's or our own, in training form or
            fused; the head is new where its classes are others. Not repeated either.
        expand_fused: give a fused MobileOne from `weights` branches that compute the same.
        freeze: submodules that stay as they are, for example `["stem", "stages.0"]`.
        freeze_bn: keep all BatchNorms' statistics, scales and shifts.
        optimizer: timm's name; `"momentum"` is plain momentum, timm's `"sgd"` is Nesterov's.
        optimizer_kwargs: further arguments of the optimizer.
        lr: learning rate at the start of the schedule.
        schedule: of the learning rate, after the warm-up: `cosine` or `linear` to 0, `step` (× 0.1
            at 30, 60 and 90 % of the steps) or `constant`; `schedules.schedule_factor` has the
            formulas.
        lr_reference_batch: if given, `lr` is meant for this effective batch (256 in the paper) and
            scaled linearly to the present one (batch × devices × accumulated batches).
        momentum: of SGD; used by optimizers that have one.
        weight_decay: at the start.
        weight_decay_end: at the end.
        weight_decay_schedule: the same shapes, from `weight_decay` to `weight_decay_end`; `step`
            multiplies by the same factor three times, `constant` does not use the end.
        no_decay_norm_bias: exempt norms and biases. The paper does not state it; mmpretrain's
            reproduction and Apple's CoreNet do so.
        warmup_epochs: linear warm-up of the learning rate before its schedule; fractions allowed.
        layer_decay: factor of the learning rate from each block to the one before it (timm's
            layer-wise decay); None for one learning rate.
        label_smoothing: of the training loss.
        mixup: alpha of mixup (arXiv 1710.09412) of the training batches, for example 0.2; 0 is off.
        cutmix: alpha of cutmix (arXiv 1905.04899), for example 1.0; 0 is off. With both, each batch
            gets one of them at random.
        metrics: further ones by torchmetrics' names, for example `["F1Score", "AUROC"]`, or with
            their arguments, `{"F1Score": {"average": "weighted"}}`; the default average is macro.
        teacher: timm name of a model to distill from; None for labels alone.
        teacher_weights: its weight file; None for timm's pretrained weights.
        distill_weight: share of the distillation loss, the rest being that of the labels.
        distill_temperature: of both models' probabilities in the distillation loss.
        quantize: train against the integer network that will ship, from trained weights: `int8`
            (weights and activations), `int4` (weights; activations in 8 bits) or `palette4` (tables
            of 16 weights, for Core ML); None trains in floating point (docs/quantization.md).
        quantize_kwargs: further arguments of `mobileone.quantization.quantize`, for example
            `{"kappa": 4.0}`.
        channels_last: memory format on CUDA. On a CPU it is not used: collapsed blocks read planes
            (docs/collapsed-training.md has both layouts' times).
        collapse: how MobileOne's blocks train: `auto` in the cheapest of the exact forms, by a cost
            model on a CPU and as `measured` on CUDA; `measured` in the one that is fastest in a
            trial, at the first steps; `always` in a collapsed one for less memory (on CUDA only
            blocks of at least four BatchNorms); `never` branch by branch. All give the same numbers
            up to rounding, so a checkpoint of one continues with any other; other networks have
            `auto` only.
        skip_nonfinite: how many steps in a row may be left out because their loss or a gradient is
            NaN or infinite; 0 stops at the first.
        seed: of dropout and mixing; None for the checkpoint's, else that of `seed_everything`,
            else 0.

    Attributes:
        test_confusion: after a test, counts (num_classes, num_classes): row = true class, column =
            predicted class.
        test_per_class: after a test, accuracy in 0..1 (num_classes,); NaN for absent classes.

    Raises:
        ValueError: an unknown name (similar ones are listed) or a value out of its range.
    """

    def __init__(
        self,
        model: str = "mobileone_s0",
        *,
        num_classes: int,
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        expand_fused: bool = True,
        freeze: Sequence[str] = (),
        freeze_bn: bool = False,
        optimizer: str = "momentum",
        optimizer_kwargs: dict[str, Any] | None = None,
        lr: float = 0.1,
        schedule: ScheduleShape = "cosine",
        lr_reference_batch: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        weight_decay_end: float = 1e-5,
        weight_decay_schedule: ScheduleShape = "cosine",
        no_decay_norm_bias: bool = False,
        warmup_epochs: float = 0.0,
        layer_decay: float | None = None,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        metrics: MetricNames = (),
        teacher: str | None = None,
        teacher_weights: str | None = None,
        distill_weight: float = 1.0,
        distill_temperature: float = 1.0,
        quantize: str | None = None,
        quantize_kwargs: dict[str, Any] | None = None,
        channels_last: bool = True,
        collapse: CollapseMode = "auto",
        skip_nonfinite: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"`num_classes` (={num_classes}) must be at least 1")
        at_least_0 = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "weight_decay_end": weight_decay_end,
            "warmup_epochs": warmup_epochs,
        }
        for name, value in at_least_0.items():
            if value < 0:
                raise ValueError(f"`{name}` (={value}) must be at least 0")
        if momentum >= 1:
            raise ValueError(f"`momentum` (={momentum}) must be below 1, for example 0.9")
        if lr_reference_batch is not None and lr_reference_batch < 1:
            raise ValueError(
                f"`lr_reference_batch` (={lr_reference_batch}) must be at least 1 image, or null"
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` (={label_smoothing}) must be in [0, 1]")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"`layer_decay` (={layer_decay}) must be in (0, 1], or be null")
        check_distillation(distill_weight, distill_temperature)
        if weight_decay == 0 and weight_decay_end != 0:
            raise ValueError(
                f"`weight_decay_end` (={weight_decay_end}) must be 0 where `weight_decay` is: "
                "annealing scales the start value"
            )
        check_shape("schedule", schedule, _STEP_LR_END)
        check_shape("weight_decay_schedule", weight_decay_schedule, self._weight_decay_ratio())
        self.num_classes = num_classes
        self._mixing = make_mixing(mixup, cutmix, num_classes)
        self.loss = self.make_loss()
        self._finite_images: list[Tensor] = []
        self._try_loss()
        self.train_loss = mean_metric()
        self.val_metrics = collect(basic_metrics(num_classes), "val/")
        self.test_metrics = collect(basic_metrics(num_classes), "test/")
        self.further_val_metrics = collect(self.make_metrics(), "val/")
        self.further_test_metrics = collect(self.make_metrics(), "test/")
        arguments = {"in_chans": in_chans, **(model_kwargs or {})}
        try:
            self.model = timm.create_model(
                model, pretrained=pretrained, num_classes=num_classes, **arguments
            )
        except (TypeError, ValueError, AttributeError) as error:
            if not model_kwargs:
                raise
            raise ValueError(
                f"`model_kwargs` (={model_kwargs}) do not fit the model {model}: {error}"
            ) from error
        # what a checkpoint brings has its statistics and scales; see `on_load_checkpoint`
        self._to_calibrate = weights is not None and load_start(self.model, weights, expand_fused)
        self._to_quantize = quantize is not None
        if quantize is not None:
            self.model = quantized(self.model, quantize, quantize_kwargs or {})
        freeze_parts(self.model, freeze, norms=freeze_bn)
        if collapse != "auto" and quantize is None:  # which has one form
            set_collapse(self.model, collapse)
        self.test_confusion: Tensor | None = None
        self.test_per_class: Tensor | None = None
        self._spec: ExportSpec | None = None
        self._teacher: Teacher | None = None

    @property
    def export_spec(self) -> ExportSpec:
        """What the model expects and returns, known from the data module or the checkpoint.

        Raises:
            ValueError: neither has been seen yet.
        """
        if self._spec is None:
            raise ValueError(
                "the names of the classes and the transform are unknown: train or test with a data "
                "module that has `class_names` and `data_config` (ImageDataModule), or load a "
                "checkpoint of such a run"
            )
        return self._spec

    def make_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the training loss; called once, in `__init__`.

        Returns:
            A function, or a module, (logits (N, num_classes), float32, targets (N,), int64, or soft
            targets (N, num_classes) with mixup or cutmix) -> the loss of each image (N,).
        """
        smoothing = self.hparams["label_smoothing"]
        return partial(F.cross_entropy, label_smoothing=smoothing, reduction="none")

    def make_metrics(self) -> dict[str, Metric]:
        """Return the metrics next to loss and accuracy; called for each of `val/` and `test/`.

        Returns:
            Logged name -> metric whose `update` takes probabilities (N, num_classes) and targets
            (N,), and whose result is one number. `make_metrics` of this class has those of the
            argument `metrics`: a subclass may return `{**super().make_metrics(), "mine": Mine()}`.
        """
        return named_metrics(self.hparams["metrics"], self.num_classes)

    def make_schedules(self, optimizer: Optimizer, total_steps: int) -> list[LRScheduler]:
        """Return the schedules of learning rate and weight decay.

        Args:
            optimizer: of `make_optimizer`.
            total_steps: optimizer steps of the complete training.

        Returns:
            Schedulers that Lightning advances after every optimizer step, saves and resumes.
        """
        h = self.hparams
        # a development run of a few batches ends before any warm-up would
        warmup_epochs = 0 if is_dry_run(self.trainer) else h["warmup_epochs"]
        warmup = round(warmup_epochs * steps_per_epoch(self.trainer)) if warmup_epochs else 0
        if warmup >= total_steps:  # of a try of a few steps
            rank_zero_warn(
                f"warm-up is cut to {total_steps - 1} of {warmup} steps: the run has {total_steps}"
            )
            warmup = total_steps - 1
        shape, end = h["schedule"], _STEP_LR_END if h["schedule"] == "step" else 0.0
        schedules: list[LRScheduler] = [Schedule(optimizer, "lr", total_steps, shape, end, warmup)]
        if h["weight_decay"]:
            shape, end = h["weight_decay_schedule"], self._weight_decay_ratio()
            schedules.append(Schedule(optimizer, "weight_decay", total_steps, shape, end))
        return schedules

    def make_optimizer(self) -> Optimizer:
        """Return timm's optimizer of the network; the training data are loaded already."""
        return self._build_optimizer(self._scaled_lr())

    def check_optimizer(self) -> None:
        """Build the optimizer once, to see whether it takes its arguments.

        Raises:
            ValueError: it does not, or there is none of this name.
        """
        self._build_optimizer(self.hparams["lr"])

    def logged_names(self) -> set[str]:
        """The names of all that a fit logs, unless a subclass or a callback logs more."""
        metrics = [*self.val_metrics.keys(), *self.further_val_metrics.keys()]
        return {"train/loss", "train/loss_epoch", "lr", "weight_decay", *map(str, metrics)}

    def setup(self, stage: str) -> None:
        """Take the class names and the transform from the data module, and check the classes.

        Raises:
            ValueError: the data have another number of classes than the model, or, unless
                training starts from the beginning, other classes than the checkpoint.
        """
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict" and isinstance(data, _ClassifiedData):
            names = tuple(data.class_names)
            if len(names) != self.num_classes:
                raise ValueError(
                    f"the model has `num_classes` (={self.num_classes}), but the data have "
                    f"{len(names)} classes: set model.num_classes to {len(names)}"
                )
            if stage != "fit" and self._spec is not None:
                check_checkpoint_classes(self._spec.class_names, names)
            self._spec = ExportSpec(self.hparams["model"], names, **data.data_config)
        if self._uses_channels_last():
            self.model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized, -> logits (N, num_classes)."""
        if self._uses_channels_last():
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.model(images)  # (N, C, H, W) -> (N, num_classes)
        return logits

    def load_teacher(self, data_config: Mapping[str, Any]) -> None:
        """Load the teacher, if there is one and it is not there yet.

        Args:
            data_config: timm's description of the images, with `input_size`, `mean` and `std`.

        Raises:
            ValueError: its weights do not fit it, or the classes.
            OSError: they cannot be read.
        """
        h = self.hparams
        if h["teacher"] is None or self._teacher is not None:
            return
        options = h["distill_weight"], h["distill_temperature"]
        classes, channels = self.num_classes, data_config["input_size"][0]
        like = data_config["mean"], data_config["std"], self.device
        self._teacher = Teacher(
            h["teacher"], classes, channels, h["teacher_weights"], *like, *options
        )

    def on_fit_start(self) -> None:
        """Calibrate what was expanded or quantized; have the teacher where the student is."""
        if self._to_calibrate:
            recalibrate_bn_before_fit(self.model, self.trainer, self.device)
            self._to_calibrate = False
        if self._to_quantize:
            check_quantization(self.hparams)
            calibrate_quantization_before_fit(self.model, self.trainer, self.device)
            self._to_quantize = False
        if self.hparams["teacher"] is not None:
            spec = self.export_spec
            self.load_teacher({"input_size": spec.input_size, "mean": spec.mean, "std": spec.std})
            assert self._teacher is not None
            self._teacher.to(self.device)

    def on_fit_end(self) -> None:
        """Let the teacher go: another fit may have other images."""
        self._teacher = None

    def on_train_start(self) -> None:
        """Hold what is frozen; validation puts the modes back as it found them."""
        set_frozen_bn_eval(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean of `make_loss`'s losses, a scalar.

        Raises:
            ValueError: a label is out of range; on a GPU only an epoch's first batch is looked at
                here (`ImageDataModule` looks at all, before they go there).
        """
        images, targets = self._checked(batch, batch_idx)
        if self._mixing is not None:
            images, targets = self._mixing(images, targets)  # targets: (N,) -> (N, num_classes)
        logits = self._logits(images)
        losses = self.loss(logits, targets)
        if self._teacher is not None:
            losses = self._teacher.mix(losses, logits, images)
        loss = self.log_step(losses.mean(), len(images))
        if self._guard.loss_is_finite:
            self.train_loss.update(losses.detach())
        else:
            self._guard.check_images(images)
        self.log("train/loss_epoch", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to `val/loss`, `val/acc1` and `val/acc5`; return the logits."""
        logits = self._evaluate(batch, batch_idx, self.val_metrics, self.further_val_metrics)
        self._finite_images.append(batch[0].isfinite().flatten(1).all(dim=1))  # (N,)
        return logits

    def on_validation_epoch_start(self) -> None:
        """Note from here on which images are finite."""
        self._finite_images = []

    def on_validation_epoch_end(self) -> None:
        """Stop a training whose weights give no finite loss, before they are saved.

        Raises:
            FloatingPointError: they do not; on all ranks.
        """
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            loss = float(self.val_metrics["loss"].compute())
            check_validation_loss(self, loss, self._finite_images)

    def on_test_epoch_start(self) -> None:
        """Start a confusion matrix; it takes num_classes² numbers, so it exists in tests only."""
        self.test_confusion = self.test_per_class = None
        self._confusion = MulticlassConfusionMatrix(self.num_classes, validate_args=False)
        self._confusion.to(self.device)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to `test/loss` … and the confusion matrix; return the logits."""
        logits = self._evaluate(batch, batch_idx, self.test_metrics, self.further_test_metrics)
        self._confusion.update(logits, batch[1])
        return logits

    def on_test_epoch_end(self) -> None:
        """Leave `test_confusion` and `test_per_class`, the same on all devices."""
        confusion = self._confusion.compute().cpu()
        del self._confusion
        self.test_confusion = confusion
        self.test_per_class = confusion.diagonal() / confusion.sum(dim=1)

    def predict_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Images (N, C, H, W), or a tuple starting with them, -> probabilities (N, num_classes)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images).softmax(dim=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint enough to rebuild the model, offline, and to export it."""
        super().on_save_checkpoint(checkpoint)
        saved = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        saved["weights"] = None  # the checkpoint has them
        if saved["model_kwargs"]:
            kept = {k: v for k, v in saved["model_kwargs"].items() if k != "checkpoint_path"}
            saved["model_kwargs"] = kept
        if self._spec is not None:
            checkpoint["export_spec"] = self._spec.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint's seed and export spec.

        Raises:
            ValueError: the data module's classes are others than the checkpoint's.
        """
        super().on_load_checkpoint(checkpoint)
        check_same_quantization(self.hparams, checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY])
        self._to_calibrate = self._to_quantize = False
        if "export_spec" not in checkpoint:
            return
        spec = ExportSpec.from_dict(checkpoint["export_spec"])
        if self._spec is not None:
            check_checkpoint_classes(spec.class_names, self._spec.class_names)
        elif spec.num_classes == self.num_classes:  # else it is loaded for other classes
            self._spec = spec

    def _build_optimizer(self, lr: float) -> Optimizer:
        h = self.hparams
        return build_optimizer(
            self.model,
            h["optimizer"],
            lr=lr,
            weight_decay=h["weight_decay"],
            momentum=h["momentum"],
            no_decay_norm_bias=h["no_decay_norm_bias"],
            layer_decay=h["layer_decay"],
            optimizer_kwargs=h["optimizer_kwargs"],
        )

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self(images)
        return logits.float()  # losses and probabilities lose too much in half precision

    def _try_loss(self) -> None:
        """Call a copy of the loss on two images.

        Raises:
            ValueError: it does not take these targets, or return the loss of each image.
        """
        who = f"the loss that `make_loss` of {type(self).__name__} returned"
        targets = torch.arange(2) % self.num_classes
        kind = "class indices (N,)"
        if self._mixing is not None:
            targets = F.one_hot(targets, self.num_classes).float()
            kind = "probabilities (N, num_classes), as mixup and cutmix make them"
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                losses = deepcopy(self.loss)(torch.zeros(2, self.num_classes), targets)
        except Exception as error:  # of the user's code
            raise ValueError(f"{who} fails on targets that are {kind}: {error}") from error
        if not isinstance(losses, Tensor) or losses.shape != (2,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"{who} gives {shape} for 2 images, but must give one value an image, (2,): use "
                "reduction='none'"
            )

    def _checked(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Check a batch of a loader of the user's own.

        Raises:
            ValueError: it is not a pair of float images (N, C, H, W) and class indices (N,).
        """
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not isinstance(batch[0], Tensor) or not batch[0].is_floating_point():
            kinds = ", ".join(
                f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else str(type(part))
                for part in (batch if isinstance(batch, tuple | list) else [batch])
            )
            raise ValueError(
                "a batch must be a pair of normalized float images (N, C, H, W) and class indices "
                f"(N,); this one has {kinds}: change what the data module's loaders collate"
            )
        images, targets = batch
        if batch_idx == 0 or targets.device.type == "cpu":  # elsewhere it would wait for the GPU
            check_targets(targets, self.num_classes)
        return images, targets

    def _evaluate(
        self,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        basic: MetricCollection,
        further: MetricCollection,
    ) -> Tensor:
        images, targets = self._checked(batch, batch_idx)
        logits = self._logits(images)
        losses = F.cross_entropy(logits, targets, reduction="none")
        basic.update(preds=logits, target=targets, value=losses)  # each takes what it knows
        further.update(logits.softmax(dim=1), targets)
        self.log_dict(basic, prog_bar=True)
        self.log_dict(further)
        return logits

    def _scaled_lr(self) -> float:
        lr: float = self.hparams["lr"]
        reference: int | None = self.hparams["lr_reference_batch"]
        if reference is None:
            return lr
        batch = effective_batch_size(self.trainer)
        rank_zero_info(f"learning rate {lr} × {batch} / {reference} = {lr * batch / reference:g}")
        return lr * batch / reference

    def _uses_channels_last(self) -> bool:
        return bool(self.hparams["channels_last"]) and self.device.type == "cuda"

    def _weight_decay_ratio(self) -> float:
        start, end = self.hparams["weight_decay"], self.hparams["weight_decay_end"]
        return float(end / start) if start else 1.0
