"""Lightning modules of segmentation (mIoU) and detection (mAP)."""

from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_modules.checks import check_model_name
from lightning_modules.optimizers import build_optimizer, total_steps
from lightning_modules.schedules import CosineSchedule
from mobileone.dense import segmenter, ssdlite

__all__ = ["IGNORED", "Detector", "Segmenter"]

IGNORED = 255
"""Label of pixels that count neither for the loss nor for the score, as in VOC's masks."""


class _DenseModule(LightningModule):
    """Optimizer and schedule of both: warm-up and cosine of the learning rate."""

    model: nn.Module

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint rebuild the network without a download."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["pretrained"] = False


class Segmenter(_DenseModule):
    """Segment images; batches are images (N, 3, H, W), normalised, and masks (N, H, W).

    Logs `train/loss`, `val/loss` and `val/miou`, the mean over the classes of the intersection over
    union of all validation pixels.

    Args:
        model: timm name of the backbone.
        num_classes: classes, background included.
        architecture: one of `mobileone.dense.SEGMENTERS`.
        pretrained: start the backbone from timm's weights.
        optimizer: timm's name.
        lr: learning rate at the start of the cosine.
        weight_decay: of weights; norms and biases do not decay.
        warmup_steps: of the learning rate.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self,
        model: str = "mobileone_s0",
        *,
        num_classes: int,
        architecture: str = "deeplabv3",
        pretrained: bool = False,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_model_name(model)
        self.model = segmenter(architecture, model, num_classes, pretrained=pretrained)
        self.iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes, H, W)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the pixels."""
        images, masks = batch
        loss = F.cross_entropy(self(images).float(), masks, ignore_index=IGNORED)
        self.log("train/loss", loss, prog_bar=True)
        return loss

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
        num_classes: classes, background (0) included.
        size: side in pixels to which images are resized.
        pretrained: start the backbone from timm's weights.
        optimizer: timm's name.
        lr: learning rate at the start of the cosine.
        weight_decay: of weights; norms and biases do not decay.
        warmup_steps: of the learning rate.

    Raises:
        ValueError: an unknown name, or a number out of range.
        ImportError: pycocotools is not installed.
    """

    def __init__(
        self,
        model: str = "mobileone_s1",
        *,
        num_classes: int,
        size: int = 320,
        pretrained: bool = False,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_model_name(model)
        self.model = ssdlite(model, num_classes, size=size, pretrained=pretrained)
        self.precision_metric = _mean_average_precision()

    def training_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> Tensor:
        """Return the sum of the losses of boxes and classes."""
        losses = self.model(*batch)
        loss: Tensor = sum(losses.values())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

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
    from torchmetrics.detection import MeanAveragePrecision

    try:
        metric = MeanAveragePrecision(backend="pycocotools")
    except ModuleNotFoundError as error:
        raise ImportError(
            "detection is scored by pycocotools: pip install -e '.[dense]'"
        ) from error
    metric.warn_on_many_detections = False  # COCO scores an image's best hundred; SSD gives more
    return metric
