"""A DataLoader that starts when the first batch is asked for, and reports unreadable files."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.data.dataset import SkippedImage
from lightning_modules.data.samplers import EpochSampler
from lightning_modules.errors import WORKER_DIED, UsageError, is_of_a_dead_worker

__all__ = [
    "DataWorkerError",
    "DeferredStartDataLoader",
    "ResumableDataLoader",
]

_NAMES_SHOWN = 5


class DataWorkerError(RuntimeError):
    """A worker process of the loader has ended without an exception of its own."""


class DeferredStartDataLoader(DataLoader):
    """Starts its workers at the first ``next``, not at ``iter``.

    Lightning creates the first iterator of a fit before it sets the sampler's epoch, and after
    a resume even before it knows the epoch itself; a plain loader would have its workers fetch
    the wrong epoch's images by then. Batches are (images, targets); the third part that
    `collate` adds stays here and becomes one warning a pass.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        unreadable: dict[str, str] = {}
        first, last = self._seek(), _length(self) - 1
        iterator = self._start()
        try:
            for position, (images, targets, skipped) in enumerate(iterator, first):
                unreadable.update(skipped)
                if position == last:  # a consumer that counts batches never asks for one more
                    _report(unreadable)
                yield images, targets
        except Exception as error:
            if self.num_workers:
                # left to the garbage collector, each worker would be waited for, seconds long
                iterator._shutdown_workers()  # type: ignore[attr-defined]
                self._iterator = None  # where workers persist: the next pass starts others
            if isinstance(error, RuntimeError) and is_of_a_dead_worker(error):
                raise DataWorkerError(WORKER_DIED) from error
            raise  # it comes from the dataset
        finally:
            _report(unreadable)

    def _start(self) -> Iterator[tuple[Tensor, Tensor, list[SkippedImage]]]:
        """PyTorch's iterator.

        Raises:
            UsageError: the workers cannot be sent the data set.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Got pickle error")  # it advises to fork
                return super().__iter__()
        except Exception as error:  # their kinds are Python's affair
            if "pickle" not in str(error):
                raise
            raise UsageError(
                f"the data set cannot be sent to the data workers ({error}): define its classes "
                "and functions at the top of a module and open files in __getitem__, or set "
                "--data.num_workers 0"
            ) from error

    def _seek(self) -> int:
        """The number of the batch that the pass begins with."""
        return 0


class ResumableDataLoader(DeferredStartDataLoader):
    """Continues within an epoch, at the batch where the resumed run stopped.

    The place is asked for when a pass starts, and comes from the training loop's own counter. It
    could not be a state of this object: Lightning 2.6 restores those when it makes the loader,
    which is before it has read them if the module asks for the number of steps in
    ``configure_optimizers``. A count kept here would also be wrong after a batch that failed.

    Args:
        options: of `DeferredStartDataLoader`; the sampler is an `EpochSampler`.
        batches_done: how many batches of the epoch are not to be repeated.
    """

    def __init__(self, *, batches_done: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self.batches_done = batches_done

    def _seek(self) -> int:
        if not isinstance(self.sampler, EpochSampler):  # `overfit_batches` puts another one here
            return 0
        assert self.batch_size is not None
        batches = self.batches_done()
        self.sampler.start = batches * self.batch_size
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing; the two methods show Lightning that resuming within an epoch works."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take; see `state_dict`."""


def _length(loader: DataLoader) -> int:
    try:
        return len(loader)
    except TypeError:  # a stream of unknown length
        return 0


def _report(unreadable: dict[str, str]) -> None:
    if not unreadable:
        return
    shown = [f"{name} ({reason})" for name, reason in sorted(unreadable.items())[:_NAMES_SHOWN]]
    more = len(unreadable) - len(shown)
    warnings.warn(
        f"skip_unreadable: {len(unreadable)} unreadable images were replaced by others in this "
        f"pass: {'; '.join(shown)}" + (f"; and {more} more" if more else ""),
        stacklevel=2,
    )
    unreadable.clear()
