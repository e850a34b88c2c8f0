"""The images of an evaluation that the network gets most wrong."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WorstImages"]


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
