"""Progressive learning: small images and weak augmentation first."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

__all__ = ["Curriculum"]

Phase = tuple[int, int, float]


@runtime_checkable
class _PhasedData(Protocol):
    set_curriculum: Callable[[Sequence[Phase]], None]


class Curriculum(Callback):
    """Raise image size and augmentation strength in steps, as the paper's recipe does.

    The paper (arXiv 2206.04040, section 4.1) raises both over 300 epochs. Where it switches is not
    in its text: public reproductions use 160 px to epoch 38, 192 to 113 and 224 after, with
    strengths 0.3, 0.7 and 1, and the paper's Figure 4 has steps at these epochs.

    The data module must have `set_curriculum(phases)`, as `ImageDataModule` has. In every epoch
    the size of the first batch is compared with the phase's, so a curriculum that does not act
    stops the run.

    Args:
        phases: `[first epoch, size in pixels, strength]` of each phase, counted in a training of
            `epochs`; empty for none. Strength weakens AutoAugment or RandAugment, if there is one.
        epochs: Length for which the phases are stated; they scale to the trainer's `max_epochs`.

    Raises:
        ValueError: Phases that do not start at epoch 0, are out of order or out of range.
    """

    def __init__(self, phases: Sequence[tuple[int, int, float]] = (), epochs: int = 300) -> None:
        self.phases = [(int(start), int(size), float(strength)) for start, size, strength in phases]
        self.epochs = epochs
        _check(self.phases, epochs)

    def scaled(self, max_epochs: int) -> list[Phase]:
        """The phases in a training of another length.

        Args:
            max_epochs: Epochs of the training.

        Returns:
            The phases with scaled first epochs; a phase that has no epoch left falls out.
        """
        by_start = {
            round(start * max_epochs / self.epochs): (size, strength)
            for start, size, strength in self.phases
        }
        return [(start, *phase) for start, phase in sorted(by_start.items())]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the phases to the data module before it makes its loaders.

        Raises:
            ValueError: The trainer has no number of epochs, or its data no curriculum.
        """
        if stage != "fit" or not self.phases:
            return
        data = cast(Any, trainer).datamodule
        if not isinstance(data, _PhasedData):
            raise ValueError(
                f"a curriculum needs a data module with `set_curriculum`; {type(data).__name__} "
                "has none: use ImageDataModule, or set curriculum.phases to []"
            )
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(
                f"a curriculum needs `max_epochs` (={trainer.max_epochs}) to scale its "
                f"{self.epochs} epochs to: set trainer.max_epochs"
            )
        self._scaled = self.scaled(trainer.max_epochs)
        data.set_curriculum(self._scaled)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check that the phase acts, and log it.

        Raises:
            RuntimeError: The images have another size.
        """
        if not self.phases:
            return
        started = [phase for phase in self._scaled if phase[0] <= trainer.current_epoch]
        _, size, strength = started[-1]
        if batch_idx == 0:
            images: Tensor = batch[0]
            if images.shape[-2] != size:
                raise RuntimeError(
                    f"epoch {trainer.current_epoch} should train on {size} px, but the images are "
                    f"{images.shape[-2]} px high: the data module does not follow its curriculum"
                )
        pl_module.log_dict({"curriculum/size": float(size), "curriculum/strength": strength})


def _check(phases: Sequence[Phase], epochs: int) -> None:
    starts = [start for start, _, _ in phases]
    if epochs < 1:
        raise ValueError(f"`epochs` (={epochs}) must be at least 1")
    if phases and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= epochs):
        raise ValueError(
            f"the phases' first epochs (={starts}) must begin with 0 and rise, below `epochs` "
            f"(={epochs})"
        )
    for start, size, strength in phases:
        if size < 1 or not 0 <= strength <= 1:
            raise ValueError(
                f"phase [{start}, {size}, {strength}]: the size must be at least 1 px and the "
                "strength in [0, 1]"
            )
