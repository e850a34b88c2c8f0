"""Knowledge distillation: the student follows a teacher's probabilities."""

from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.recipe.finetuning import load_start

__all__ = ["Teacher", "check_distillation", "distillation_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Hinton's loss (arXiv 1503.02531): `T² KL(softmax(teacher / T) ‖ softmax(student / T))`.

    With `T = 1` it is that of MEAL V2 (arXiv 2009.08453), by whose recipe MobileOne's Table 10 was
    distilled. Its gradient in the logits is `T (softmax(student / T) − softmax(teacher / T))`.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        temperature: T > 0.

    Returns:
        The loss of each image, (N,).
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence


class Teacher:
    """A frozen timm model that sees the student's batches.

    It is not an `nn.Module`, so that it is neither saved, averaged, exported nor trained.

    Args:
        name: timm name.
        num_classes: of the student; the teacher must have as many.
        in_chans: channels of the images.
        weights: a file; None for timm's pretrained weights.
        mean: of the student's normalization, one value a channel.
        std: of the student's normalization, one value a channel.
        device: where the student trains.
        weight: share of the distillation loss in [0, 1]; the rest is the loss of the labels.
        temperature: of the distillation loss, greater than 0.

    Raises:
        ValueError: the teacher has other classes.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_chans: int,
        weights: str | None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        self.weight, self.temperature = weight, temperature
        if weights is None:
            model = timm.create_model(name, pretrained=True, in_chans=in_chans)
        else:
            model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
            load_start(model, weights, expand_fused=False)
        if model.num_classes != num_classes:
            raise ValueError(
                f"the teacher {name} knows {model.num_classes} classes, the data have "
                f"{num_classes}: give weights for these classes with --model.teacher_weights"
            )
        self.model: nn.Module = model.eval().requires_grad_(False).to(device)
        cfg = timm.data.resolve_data_config(model=model)
        # x = (pixel - mean) / std of the student; the teacher wants its own
        own_mean, own_std, its_mean, its_std = (
            torch.tensor(tuple(values), device=device).view(-1, 1, 1)
            for values in (mean, std, cfg["mean"], cfg["std"])
        )
        self._scale = own_std / its_std
        self._shift = (own_mean - its_mean) / its_std

    def to(self, device: torch.device) -> None:
        """Move to where the student trains."""
        self.model.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized for the student, -> the teacher's logits (N, classes)."""
        logits: Tensor = self.model(images * self._scale + self._shift)
        return logits.float()

    def mix(self, losses: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Blend the distillation loss into that of the labels.

        Args:
            losses: of the labels, (N,).
            logits: of the student, (N, C).
            images: normalized for the student, (N, C, H, W).

        Returns:
            The loss of each image, (N,).
        """
        follow = distillation_loss(logits, self(images), self.temperature)
        return (1 - self.weight) * losses + self.weight * follow


def check_distillation(weight: float, temperature: float) -> None:
    """Raise ValueError unless the share is in [0, 1] and the temperature is positive."""
    if not 0 <= weight <= 1:
        raise ValueError(f"`distill_weight` (={weight}) must be in [0, 1]")
    if temperature <= 0:
        raise ValueError(f"`distill_temperature` (={temperature}) must be greater than 0")
