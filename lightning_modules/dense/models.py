"""Lightning modules of segmentation (mIoU) and detection (mAP)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_modules.checks import check_checkpoint_classes
from lightning_modules.dense.sources import IGNORED
from lightning_modules.recipe.optimizers import build_optimizer
from lightning_modules.recipe.schedules import Schedule
from lightning_modules.recipe.training_module import TrainingModule
from mobileone.dense import segmenter, ssdlite
from mobileone.io.optional_import import import_optional

__all__ = ["Detector", "Segmenter"]

_CLASSES = "class_names"  # in a checkpoint


class _DenseModule(TrainingModule):
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
        self.class_names = ("background", *(f"class {n}" for n in range(1, num_classes)))

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.class_names = data.class_names

    def make_optimizer(self) -> Optimizer:
        """Return timm's optimizer of the network."""
        h = self.hparams
        options = {"lr": h["lr"], "weight_decay": h["weight_decay"]}
        return build_optimizer(self.model, h["optimizer"], **options, no_decay_norm_bias=True)

    def make_schedules(self, optimizer: Optimizer, total_steps: int) -> list[LRScheduler]:
        """Return the cosine of the learning rate."""
        warmup = min(self.hparams["warmup_steps"], total_steps - 1)
        return [Schedule(optimizer, "lr", total_steps, warmup_steps=warmup)]

    def log_step(self, loss: Tensor, batch_size: int) -> Tensor:
        """Log `train/loss_epoch`, too."""
        loss = super().log_step(loss, batch_size)
        if self._guard.loss_is_finite:
            self.log("train/loss_epoch", loss, on_step=False, on_epoch=True, batch_size=batch_size)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the classes, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CLASSES] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed and the names of the checkpoint's classes.

        Raises:
            ValueError: the data have others.
        """
        names = tuple(checkpoint.get(_CLASSES, self.class_names))
        if self._trainer is not None:
            check_checkpoint_classes(names, self.class_names)
        self.class_names = names
        super().on_load_checkpoint(checkpoint)


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
        return self.log_step(loss, len(images))

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
        self.precision_metric = _mean_average_precision()

    def training_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> Tensor:
        """Return the sum of the losses of boxes and classes."""
        losses = self.model(*batch)
        loss: Tensor = sum(losses.values())
        return self.log_step(loss, len(batch[0]))

    def validation_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> None:
        """Keep the detections of a batch."""
        images, targets = batch
        self.precision_metric.update(self.model(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Score what was kept."""
        scores = self.precision_metric.compute()
        self.precision_metric.reset()
        self.log_dict({f"val/{key}": scores[key] for key in ("map", "map_50")}, prog_bar=True)


def _mean_average_precision() -> Any:
    """COCO's metric as torchmetrics computes it by pycocotools.

    Raises:
        ImportError: pycocotools is not installed.
    """
    import_optional("pycocotools", "the score of a detection", "mobileone-lightning[dense]")
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="pycocotools")
    metric.warn_on_many_detections = False  # COCO scores an image's best hundred; SSD gives more
    return metric
