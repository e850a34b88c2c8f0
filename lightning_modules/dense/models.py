"""Lightning modules of segmentation (mIoU) and detection (mAP)."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_modules.checks import check_checkpoint_classes, check_model_name
from lightning_modules.dense.sources import IGNORED
from lightning_modules.randomness import derive_seed, resolve_seed
from lightning_modules.recipe.nonfinite_guard import NonFiniteGuard
from lightning_modules.recipe.optimizers import build_optimizer, total_steps
from lightning_modules.recipe.schedules import CosineSchedule
from mobileone.dense import segmenter, ssdlite

__all__ = ["Detector", "Segmenter", "mean_average_precision"]

_CLASSES, _SEED = "class_names", "dropout_seed"  # in a checkpoint


class _DenseModule(LightningModule):
    """Optimizer, schedule and names of the classes of both.

    Args:
        num_classes: classes, background (0) included.
        optimizer: timm's name.
        lr: learning rate at the start of the cosine.
        weight_decay: of weights; norms and biases do not decay.
        warmup_steps: of the learning rate.
        skip_nonfinite: how many steps in a row may be left out because their loss or a gradient is
            NaN or infinite; 0 stops at the first.
        seed: of dropout; None for the checkpoint's, else that of `seed_everything`, else 0.

    Attributes:
        class_names: of the data, or of the checkpoint's data.
    """

    model: nn.Module

    def __init__(
        self,
        *,
        num_classes: int,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup_steps: int = 0,
        skip_nonfinite: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # those of the subclass, too
        check_model_name(self.hparams["model"])
        self.class_names = ("background", *(f"class {n}" for n in range(1, num_classes)))
        self._guard = NonFiniteGuard(skip_nonfinite)
        self._restored_seed: int | None = None

    @property
    def seed(self) -> int:
        """The seed in force: the argument, else the checkpoint's, else the run's, else 0."""
        return resolve_seed(self.hparams["seed"], self._restored_seed)

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.class_names = data.class_names

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """Return the optimizer and the schedule of its learning rate."""
        h = self.hparams
        steps = total_steps(self.trainer)
        optimizer = build_optimizer(
            self.model,
            h["optimizer"],
            lr=h["lr"],
            weight_decay=h["weight_decay"],
            no_decay_norm_bias=True,
        )
        warmup = min(h["warmup_steps"], steps - 1)
        schedule = CosineSchedule(optimizer, "lr", steps, warmup_steps=warmup)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the randomness of this batch independent of what was drawn before."""
        torch.manual_seed(derive_seed(self.seed, self.global_rank, self.current_epoch, batch_idx))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._guard.save_buffers(self.model)

    def _step(self, loss: Tensor, images: int) -> Tensor:
        """Log a scalar loss, if it is finite, and the learning rate; returns what to minimize."""
        loss = self._guard.check_loss(loss)
        if self._guard.loss_is_finite:
            self.log("train/loss", loss, prog_bar=True, batch_size=images)
            self.log("train/loss_epoch", loss, on_step=False, on_epoch=True, batch_size=images)
        groups = self.trainer.optimizers[0].param_groups
        self.log("lr", max(float(group["lr"]) for group in groups), batch_size=images)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the step out if its loss or a gradient is not finite, or stop.

        Raises:
            FloatingPointError: it is not (see `skip_nonfinite`). The weights are still those before
                the step.
        """
        self._guard.check_gradients(self, optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint rebuild the network without a download, and name the classes."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["pretrained"] = False
        checkpoint[_CLASSES] = list(self.class_names)
        checkpoint[_SEED] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed and the names of the checkpoint's classes.

        Raises:
            ValueError: the data have others.
        """
        names = tuple(checkpoint.get(_CLASSES, self.class_names))
        if self._trainer is not None:
            check_checkpoint_classes(names, self.class_names)
        self.class_names = names
        self._restored_seed = checkpoint.get(_SEED)


class Segmenter(_DenseModule):
    """Segment images; batches are images (N, 3, H, W), normalized, and masks (N, H, W).

    Logs `train/loss`, `val/loss` and `val/miou`, the mean over the classes of the intersection over
    union of all validation pixels.

    Args:
        model: timm name of the backbone.
        architecture: one of `mobileone.dense.SEGMENTERS`.
        pretrained: start the backbone from timm's weights.
        options: number of classes, optimizer and its schedule.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self,
        model: str = "mobileone_s0",
        *,
        architecture: str = "deeplabv3",
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        classes = self.hparams["num_classes"]
        self.model = segmenter(architecture, model, classes, pretrained=pretrained)
        self.iou = MulticlassJaccardIndex(classes, ignore_index=IGNORED)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes, H, W)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the pixels."""
        images, masks = batch
        loss = F.cross_entropy(self(images).float(), masks, ignore_index=IGNORED)
        return self._step(loss, len(images))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation's loss and score."""
        images, masks = batch
        logits = self(images).float()
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORED)
        self.iou.update(logits.argmax(dim=1), masks)
        self.log("val/loss", loss, batch_size=len(images), sync_dist=True)
        self.log("val/miou", self.iou, prog_bar=True)


class Detector(_DenseModule):
    """Detect objects by SSDLite; batches are a list of images in 0..1 and a list of targets.

    Logs `train/loss`, `val/map` (COCO's, IoU 0.50 to 0.95) and `val/map_50`.

    Args:
        model: timm name of the backbone.
        size: side in pixels to which images are resized.
        smallest_anchor: side of the finest map's anchors, as a part of the image's.
        pretrained: start the backbone from timm's weights.
        options: number of classes, optimizer and its schedule.

    Raises:
        ValueError: an unknown name, or a number out of range.
        ImportError: pycocotools is not installed.
    """

    def __init__(
        self,
        model: str = "mobileone_s1",
        *,
        size: int = 320,
        smallest_anchor: float = 0.2,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        classes = self.hparams["num_classes"]
        self.model = ssdlite(
            model, classes, size=size, smallest_anchor=smallest_anchor, pretrained=pretrained
        )
        self.precision_metric = mean_average_precision()

    def training_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> Tensor:
        """Return the sum of the losses of boxes and classes."""
        losses = self.model(*batch)
        loss: Tensor = sum(losses.values())
        return self._step(loss, len(batch[0]))

    def validation_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> None:
        """Keep the detections of a batch."""
        images, targets = batch
        self.precision_metric.update(self.model(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Score what was kept."""
        scores = self.precision_metric.compute()
        self.precision_metric.reset()
        self.log_dict({f"val/{key}": scores[key] for key in ("map", "map_50")}, prog_bar=True)


def mean_average_precision() -> Any:
    """COCO's metric as torchmetrics computes it by pycocotools.

    Raises:
        ImportError: pycocotools is not installed.
    """
    from torchmetrics.detection import MeanAveragePrecision

    try:
        metric = MeanAveragePrecision(backend="pycocotools")
    except ModuleNotFoundError as error:
        raise ImportError(
            "detection is scored by pycocotools: pip install -e '.[dense]'"
        ) from error
    metric.warn_on_many_detections = False  # COCO scores an image's best hundred; SSD gives more
    return metric
