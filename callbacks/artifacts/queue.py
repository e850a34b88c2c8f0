"""The exports of a fit: one after the other, here or in a worker process."""

import contextlib
import copy
import traceback
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.artifacts.folder import CheckpointFolder
from mobileone.export import ExportSpec, Metadata, TrainingState, export_model
from mobileone.export.checkpoint import model_weights, read_checkpoint
from mobileone.export.isolation import isolated
from mobileone.export.preprocess import denormalize
from mobileone.export.worker import ExportJob, Task, can_travel
from mobileone.io.atomic import staging_folder

__all__ = [
    "ExportQueue",
    "Outcome",
    "Request",
    "first_images_uint8",
    "get_network",
    "spec_of",
    "training_state",
]


@dataclass(frozen=True)
class Request:
    """A checkpoint whose artifact is wanted.

    Attributes:
        checkpoint: the file; the weights are read from it.
        network: has the architecture; copied, not changed.
        spec: what the network expects.
        formats: of the artifact.
        training: where in training the checkpoint stands.
        metadata: for the artifact.
        images: 8-bit images (N, C, H, W) to compare on, or None.
    """

    checkpoint: str
    network: nn.Module
    spec: ExportSpec
    formats: tuple[str, ...]
    training: TrainingState
    metadata: Metadata
    images: Tensor | None

    def snapshot(self) -> Task:
        """The network on the CPU with the checkpoint's weights."""
        with isolated():
            weights = model_weights(read_checkpoint(Path(self.checkpoint))["state_dict"])
            model = copy.deepcopy(self.network).cpu()
            model.load_state_dict(weights)
        artifact = CheckpointFolder.artifact_of(self.checkpoint)
        return Task(
            model, self.spec, artifact, self.formats, self.training, self.metadata, self.images
        )


@dataclass(frozen=True)
class Outcome:
    """How an export ended: published, or why not."""

    checkpoint: str
    failure: str | None


class ExportQueue:
    """A queue with at most one export under way.

    What has not ended well is on record beside its checkpoint from the moment it begins, so that
    a process that is killed leaves no artifact that could be taken for complete.

    Args:
        folder: where checkpoints and artifacts are.
        background: export in a worker process; otherwise `submit` returns when all is done. A
            network that another process cannot rebuild is exported in this one.
        timeout: seconds after which a worker is stopped.
    """

    def __init__(self, folder: CheckpointFolder, background: bool, timeout: float) -> None:
        self.folder, self.background, self.timeout = folder, background, timeout
        self._queue: deque[Request] = deque()
        self._current: tuple[Request, ExportJob] | None = None
        self._ended: list[Outcome] = []

    @property
    def under_way(self) -> bool:
        """Whether a worker runs."""
        return self._current is not None and self._current[1].running()

    def submit(self, request: Request) -> None:
        """Export a checkpoint, now or after those before it."""
        self._record(request, "the export has not ended")
        self._queue.append(request)
        self._advance()

    def poll(self) -> list[Outcome]:
        """What has ended since the last question, without waiting."""
        if self._current and not self._current[1].running():
            self._finish()
            self._advance()
        ended, self._ended = self._ended, []
        return ended

    def drain(self) -> list[Outcome]:
        """Wait for all of them."""
        while self._current:
            self._finish()
            self._advance()
        return self.poll()

    def stop(self) -> None:
        """End the worker, if there is one; what it had not published stays on record."""
        self._queue.clear()
        if self._current:
            self._current[1].stop()
            self._current = None

    def _advance(self) -> None:
        """Begin what can begin."""
        while self._queue and not self._current:
            request = self._queue.popleft()
            try:
                self._begin(request)
            except Exception as error:
                self._end(request, f"{type(error).__name__}: {error}", traceback.format_exc())

    def _begin(self, request: Request) -> None:
        task = request.snapshot()
        if self.background and can_travel(task.model):
            place = staging_folder(self.folder.path)
            with contextlib.suppress(PicklingError, AttributeError, TypeError):  # by pickle
                self._current = request, ExportJob(task, place, self.timeout)
                return
        task.publish(export_model)
        self._end(request, None)

    def _finish(self) -> None:
        assert self._current is not None
        request, job = self._current
        self._current = None
        failure = job.wait()
        message = failure.strip().splitlines()[-1] if failure else None
        self._end(request, message, failure)

    def _end(self, request: Request, failure: str | None, details: str | None = None) -> None:
        if failure is None:
            self.folder.clear_error(request.checkpoint)
        else:
            name = self.folder.artifact_of(request.checkpoint).name
            self._record(request, details or failure)
            failure = f"Exporting {name} failed: {failure}"
        self._ended.append(Outcome(request.checkpoint, failure))

    def _record(self, request: Request, error: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            self.folder.record_error(request.checkpoint, error, asdict(request.training))


def get_network(pl_module: LightningModule) -> nn.Module:
    """The network that ships, without the wrapper of `torch.compile`.

    Raises:
        TypeError: there is no `self.model`.
    """
    model = getattr(pl_module, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{type(pl_module).__name__} must keep the network that ships in `self.model`"
        )
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def spec_of(pl_module: LightningModule) -> ExportSpec:
    """The module's `export_spec`.

    Raises:
        TypeError: it is something else.
    """
    spec = pl_module.export_spec
    if not isinstance(spec, ExportSpec):
        raise TypeError(f"`export_spec` must be an ExportSpec, not {type(spec).__name__}")
    return spec


def first_images_uint8(batch: Any, spec: ExportSpec, count: int = 8) -> Tensor | None:
    """The first 8-bit images of a batch (images, ...); None if they are not of the spec's size."""
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != spec.input_size:
        return None
    return denormalize(images[:count], spec)


def training_state(checkpoint: str, monitor: str, score: Tensor | None) -> TrainingState:
    """Describe a checkpoint whose run was killed before its artifact was made.

    Args:
        checkpoint: the file.
        monitor: the metric that ranks checkpoints.
        score: its value, if the checkpoint is ranked.

    Returns:
        Epoch, step and that one metric: the others were not kept.

    Raises:
        ValueError: the file is damaged.
    """
    contents = read_checkpoint(Path(checkpoint))
    metrics = {} if score is None else {monitor: float(score)}
    return TrainingState(
        epoch=contents.get("epoch"),
        step=contents.get("global_step"),
        metrics=metrics,
        checkpoint=Path(checkpoint).name,
    )
