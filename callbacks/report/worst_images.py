"""The images of an evaluation that the network gets most wrong."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mobileone.io.atomic import replace_text

__all__ = ["WorstImage", "WorstImages", "read_worst", "write_worst"]


@dataclass(frozen=True)
class WorstImage:
    """One image and what was made of it.

    Attributes:
        png: The image as the network saw it, a PNG file in base64.
        true: Name of its class.
        predicted: Name of the class that was predicted.
        probability: Of the predicted class, in 0..1.
        probability_true: Of its class, in 0..1.
        loss: Cross-entropy.
    """

    png: str
    true: str
    predicted: str
    probability: float
    probability_true: float
    loss: float


class WorstImages:
    """Keeps the images of highest cross-entropy, batch after batch.

    Args:
        count: How many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, images: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Look at a batch.

        Args:
            images: (N, C, H, W), normalized.
            targets: (N,), class indices.
            logits: (N, number of classes).
        """
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        chosen = losses.topk(min(self.count, len(losses))).indices
        batch = (losses, images.float(), targets, logits.float().softmax(dim=1))
        new = [part[chosen].cpu() for part in batch]
        if self._kept is not None:
            new = [torch.cat(pair) for pair in zip(self._kept, new, strict=True)]
        best = new[0].topk(min(self.count, len(new[0]))).indices
        losses, images, targets, probabilities = (part[best] for part in new)
        self._kept = losses, images, targets, probabilities

    def found(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Losses (n,), images (n, C, H, W), targets (n,), probabilities (n, classes); or None."""
        return self._kept


def write_worst(
    path: Path,
    pixels: Tensor,
    losses: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    names: Sequence[str],
) -> None:
    """Write the images and what was made of them as one JSON file, atomically.

    Args:
        path: The file.
        pixels: (n, C, H, W), values in 0..1.
        losses: (n,).
        targets: (n,), class indices.
        probabilities: (n, number of classes).
        names: Names of the classes.
    """
    confidence, predicted = probabilities.max(dim=1)
    images = [
        WorstImage(
            _png(image),
            names[target],
            names[guess],
            float(p),
            float(every[target]),
            float(loss),
        )
        for image, loss, target, every, p, guess in zip(
            pixels,
            losses,
            targets.tolist(),
            probabilities,
            confidence,
            predicted.tolist(),
            strict=True,
        )
    ]
    replace_text(path, json.dumps([asdict(image) for image in images]))


def read_worst(path: Path) -> list[WorstImage]:
    """Read what `write_worst` wrote.

    Raises:
        ValueError: It is something else.
    """
    try:
        images = [WorstImage(**image) for image in json.loads(path.read_text(encoding="utf-8"))]
        for image in images:
            base64.b64decode(image.png, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold images: {error}") from error
    return images


def _png(pixels: Tensor) -> str:
    """(C, H, W) in 0..1 -> PNG in base64; of other than 1, 3 or 4 channels the first."""
    shown = pixels if len(pixels) in (3, 4) else pixels[:1]
    array = (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
