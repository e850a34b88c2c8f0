"""After each validation: a checkpoint, and from its weights the fused files that ship."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.checkpoint_folder import CheckpointFolder
from callbacks.exports import Exports, Outcome, Request
from callbacks.recovery import training_state
from callbacks.saving import on_rank_zero, save_complete, without_raising
from mobileone.export import ExportSpec, Manifest, Metadata, TrainingState
from mobileone.export.checkpoint import IMAGES_KEY
from mobileone.export.formats import DEFAULT_FORMATS, check_formats
from mobileone.export.manifest import MANIFEST_NAME
from mobileone.export.preprocess import denormalise
from mobileone.export.publish import clean_stale, sole_writer

__all__ = ["ReparameterizeOnSave"]


class ReparameterizeOnSave(ModelCheckpoint):
    """Save a checkpoint and its fused artifact after every validation of a fit.

    ```
    <dirpath>/epoch=003-step=000400.ckpt    training checkpoint
    <dirpath>/epoch=003-step=000400/        model.torchscript.pt, model.mlpackage, manifest.json
    <dirpath>/last.ckpt, last/, best.ckpt, best/    relative links
    ```

    The artifact is built from the `state_dict` inside the checkpoint file (the averaged weights
    where weights are averaged). Each new file appears complete, then the links move, then what is
    neither the last nor among the best is removed: a kill at any moment leaves a usable last
    checkpoint and artifact. One process may write to a `dirpath` at a time.

    The module must keep its network in `self.model` and offer an `export_spec`
    (`mobileone.export.ExportSpec`). Strategies that write one checkpoint file are supported.

    With `background`, a worker process converts a copy on the CPU while training goes on. The next
    validation waits for it, and so does the end of the fit; a worker that dies or hangs is a
    failed export.

    Every format is compared with the network on the first validation images, which are kept in the
    checkpoint for later exports (unless `save_weights_only`). An artifact above a
    format's tolerance is not published: it is a failed export, and its files stay in
    `<name>.rejected/` for a look. Errors and sizes go to the loggers as `export/<format>/...`.

    Args:
        monitor: metric that ranks the checkpoints.
        mode: `max` if more is better, `min` if less is.
        save_top_k: how many of the best to keep beside the last; -1 keeps all, 0 only the last.
        dirpath: folder for it all; None takes `checkpoints` in the logger's folder, or in the
            trainer's `default_root_dir`.
        filename: name of a checkpoint; must contain `{step}`, so that names differ.
        formats: formats of the artifact, names from `mobileone.export.FORMATS`.
        metadata: author, licence, description and version for the artifact.
        strict: raise when an export fails. Otherwise training goes on with a warning, the error is
            kept in `last_error` and beside the checkpoint, and the next validation tries again.
        background: export in a worker process while training goes on.
        timeout: seconds after which a worker is stopped.
        save_weights_only: leave optimizers, schedulers and callbacks out of the checkpoints.

    Attributes:
        last_error: why the last export failed, or None.
        listeners: called on rank 0 with the folder and the manifest of each published artifact,
            after the links have moved.

    Raises:
        ValueError: an unknown format, or a `filename` without `{step}`.
    """

    def __init__(
        self,
        monitor: str = "val/acc1",
        mode: str = "max",
        save_top_k: int = 1,
        dirpath: str | None = None,
        filename: str = "{epoch:03d}-{step:06d}",
        formats: Sequence[str] = DEFAULT_FORMATS,
        metadata: Metadata | None = None,
        strict: bool = False,
        background: bool = True,
        timeout: float = 900.0,
        save_weights_only: bool = False,
    ) -> None:
        if "{step" not in filename:
            raise ValueError(f"`filename` (={filename!r}) must contain {{step}}: names must differ")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.formats = check_formats(formats)
        self.metadata = metadata or Metadata()
        self.strict = strict
        self.background, self.timeout = background, timeout
        self.last_error: str | None = None
        self._exports: Exports | None = None
        self._images: Tensor | None = None
        self._hold = contextlib.ExitStack()  # of the folder, during a fit
        self.listeners: list[Callable[[Path, Manifest], None]] = []

    # -- What others may ask -----------------------------------------------------------------

    @property
    def artifact_path(self) -> Path | None:
        """Folder of the newest artifact, or None."""
        return self._folder.linked_artifact("last") if self.dirpath else None

    @property
    def best_artifact_path(self) -> Path | None:
        """Folder of the best checkpoint's artifact, or None."""
        return self._folder.linked_artifact("best") if self.dirpath else None

    # -- Lightning's hooks -------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if inspect.getattr_static(pl_module, "export_spec", None) is None:
            raise TypeError(
                f"{type(pl_module).__name__} has no `export_spec`: define a property that returns "
                "mobileone.export.ExportSpec(model_name=..., class_names=..., input_size=..., "
                "mean=..., std=..., interpolation=..., crop_pct=...) and keep the network in "
                "`self.model`"
            )
        if self.dirpath is None:
            root = Path(trainer.log_dir or trainer.default_root_dir)
            self.dirpath = str((root / "checkpoints").resolve())
        with warnings.catch_warnings():  # said better, and not on resuming, by on_fit_start
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _network_of(pl_module), _spec_of(pl_module)  # better now than after an epoch
        if _dry_run(trainer):
            return
        failure = on_rank_zero(trainer, lambda: self._take_folder(trainer))
        if failure:
            raise RuntimeError(failure)
        if trainer.ckpt_path is not None:
            self._report(on_rank_zero(trainer, lambda: self._recover(trainer, pl_module)))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images of the fit to compare the files on."""
        if self._images is None and batch_idx == 0 and trainer.is_global_zero:
            self._images = _pixels_of(batch, _spec_of(pl_module))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """So that a later export of the file alone is compared on the same images."""
        if self._images is not None:
            checkpoint[IMAGES_KEY] = self._images

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in an export that has ended meanwhile."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._exports is None or self.strict:  # strict: all ranks stop at the next validation
            return
        if ended := self._exports.poll():
            self._report(without_raising(lambda: self._settle(trainer, ended)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last export."""
        super().on_train_end(trainer, pl_module)
        if _dry_run(trainer):
            return
        failure = on_rank_zero(trainer, lambda: self._drain(trainer))
        self._conclude(failure)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let an export end that was under way."""
        super().on_exception(trainer, pl_module, exception)
        self._report(without_raising(lambda: self._drain(trainer)))
        self._leave()  # after Ctrl-C Lightning does not tear callbacks down

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no process and no lock behind."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or _dry_run(trainer):
            return
        metrics = self._monitor_candidates(trainer)
        path, score, self.best_k_models = trainer.strategy.broadcast(
            (self.format_checkpoint_name(metrics), self._score(metrics), self.best_k_models)
        )
        before = {**super().state_dict()}
        earlier = {*self.best_k_models, self.last_model_path} - {""}
        self._rank(path, score)
        try:
            self._save_checkpoint(trainer, path)
        except BaseException:
            self._restore(before)
            raise
        training = TrainingState(
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            metrics={k: float(v) for k, v in trainer.callback_metrics.items()},
            checkpoint=Path(path).name,
        )
        failure = on_rank_zero(
            trainer, lambda: self._publish(trainer, pl_module, path, training, earlier)
        )
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._conclude(failure)

    def format_checkpoint_name(
        self,
        metrics: dict[str, Tensor],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """As the base class, but a `/` in a metric's name does not make a folder."""
        folder = Path(self.dirpath or "")
        name = Path(super().format_checkpoint_name(metrics, filename, ver, prefix))
        return str(folder / name.relative_to(folder).as_posix().replace("/", "_"))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the ranking; files are looked up by name in `dirpath`, and must still be there.

        So a run folder may be moved, and a new run that starts from another's checkpoint starts
        with an empty ranking.
        """
        here = Path(self.dirpath or "")
        scores = {str(here / Path(p).name): s for p, s in state_dict["best_k_models"].items()}
        self.best_k_models = {p: s for p, s in scores.items() if Path(p).is_file()}
        last = here / Path(state_dict["last_model_path"]).name
        self.last_model_path = str(last) if last.is_file() else ""
        self.current_score = state_dict["current_score"]
        self._name_best()

    # -- One step of the work each -----------------------------------------------------------

    @property
    def _folder(self) -> CheckpointFolder:
        assert self.dirpath is not None
        return CheckpointFolder(self.dirpath)

    def _score(self, metrics: dict[str, Tensor]) -> Tensor:
        """The monitored value; NaN ranks behind everything."""
        if self.monitor not in metrics:
            available = sorted(set(metrics) - {"epoch", "step"})
            raise ValueError(
                f"`monitor` (={self.monitor!r}) was not logged by this validation; available: "
                f"{available}. Set `monitor` to one of them, or log it in `validation_step`"
            )
        value = float(metrics[self.monitor])
        if math.isnan(value):
            value = math.inf if self.mode == "min" else -math.inf
        return torch.tensor(value)

    def _rank(self, path: str, score: Tensor) -> None:
        """Enter a checkpoint; of equal ones the older stays ahead."""
        scores = {p: s for p, s in self.best_k_models.items() if p != path} | {path: score}
        order = sorted(scores, key=lambda p: float(scores[p]), reverse=self.mode == "max")
        kept = order if self.save_top_k == -1 else order[: self.save_top_k]
        self.best_k_models = {p: scores[p] for p in kept}
        self.current_score = score
        self.last_model_path = path
        self._name_best()

    def _name_best(self) -> None:
        """Derive the base class's other attributes from the ranking, which is in order."""
        ranked = list(self.best_k_models)
        self.best_model_path = ranked[0] if ranked else ""
        self.best_model_score = self.best_k_models[ranked[0]] if ranked else None
        self.kth_best_model_path = ranked[-1] if ranked else ""
        if ranked:
            self.kth_value = self.best_k_models[ranked[-1]]

    def _restore(self, state: dict[str, Any]) -> None:
        for name in ("best_k_models", "current_score", "last_model_path"):
            setattr(self, name, state[name])
        self._name_best()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        save_complete(trainer, Path(filepath), self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _take_folder(self, trainer: Trainer) -> str | None:
        """Make sure that nobody else writes there, and clear what a killed run has left."""
        folder = self._folder
        try:
            # for some seconds a killed run's data workers keep its folder
            patience = 15.0 if trainer.ckpt_path else 0.0
            self._hold.enter_context(sole_writer(folder.path, patience))
        except FileExistsError as error:
            return str(error)
        clean_stale(folder.path)
        self._exports = Exports(folder, self.background, self.timeout)
        if trainer.ckpt_path is None and any(folder.path.glob("*.ckpt")):
            rank_zero_warn(
                f"{self.dirpath} holds checkpoints of another run: those of the same name will be "
                "replaced, the others stay and do not count as best"
            )
        return None

    def _recover(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Bring links and artifacts up to the ranking: a killed run may not have come to it.

        Waits for the exports, since a run that is done has no later moment to do so.
        """
        exports, folder = self._exports, self._folder
        assert exports is not None
        for path in dict.fromkeys([*self.best_k_models, self.last_model_path]):
            if path and not folder.has_artifact(path):
                record = folder.recorded_error(path)
                if record and "RejectedError: " in record["error"]:
                    continue
                state = training_state(path, str(self.monitor), self.best_k_models.get(path))
                exports.submit(self._request(pl_module, path, state))
        return self._settle(trainer, exports.drain()) if self.last_model_path else None

    def _leave(self) -> None:
        if self._exports is not None:
            self._exports.stop()
            self._exports = None
        self._hold.close()

    def _publish(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        path: str,
        training: TrainingState,
        earlier: set[str],
    ) -> str | None:
        """All that rank 0 does once the checkpoint is complete. Returns what went wrong."""
        exports = self._exports
        assert exports is not None
        ended = exports.drain()  # those of the validation before
        exports.submit(self._request(pl_module, path, training))
        ended += exports.poll()
        if not any(o.failure and o.checkpoint == path for o in ended):
            for missed, record in self._missed(path):
                exports.submit(self._request(pl_module, missed, record))
            ended += exports.poll()
        return self._settle(trainer, ended, earlier)

    def _request(self, pl_module: LightningModule, path: str, training: TrainingState) -> Request:
        return Request(
            path,
            _network_of(pl_module),
            _spec_of(pl_module),
            self.formats,
            training,
            self.metadata,
            self._images,
        )

    def _missed(self, current: str) -> list[tuple[str, TrainingState]]:
        """The best checkpoints whose export failed; one that was rejected would be again."""
        folder = self._folder
        records = {
            path: folder.recorded_error(path)
            for path in self.best_k_models
            if path != current and not folder.has_artifact(path)
        }
        return [
            (path, TrainingState(**record["training"]))
            for path, record in records.items()
            if record and "RejectedError: " not in record["error"]
        ]

    def _drain(self, trainer: Trainer) -> str | None:
        ended = self._exports.drain() if self._exports is not None else []
        return self._settle(trainer, ended) if ended else None

    def _settle(
        self, trainer: Trainer, ended: Sequence[Outcome], earlier: Collection[str] = ()
    ) -> str | None:
        """Move the links, remove what is neither last nor best, tell the listeners.

        Returns:
            What went wrong with the newest of the exports that have ended, empty if nothing; None
            if none has ended.
        """
        folder, last = self._folder, self.last_model_path
        before = {*earlier, *folder.linked_checkpoints()}
        folder.move_link("last", [last])
        folder.move_link("best", self.best_k_models)
        keep = {*self.best_k_models, last} | folder.linked_checkpoints()
        for old in sorted(before - keep):
            if self._should_remove_checkpoint(trainer, old, last):
                folder.remove(old)
        for outcome in ended:
            self._tell(trainer, outcome)
        failures = [outcome.failure for outcome in ended if outcome.failure]
        return ["", *failures][-1] if ended else None

    def _tell(self, trainer: Trainer, outcome: Outcome) -> None:
        """Log how far the files are from the network, and hand on what was published."""
        folder = self._folder
        artifact = folder.artifact_of(outcome.checkpoint)
        published = outcome.failure is None
        place = artifact if published else folder.rejected_of(outcome.checkpoint)
        if not (place / MANIFEST_NAME).is_file():
            return
        manifest = Manifest.load(place)
        for logger in trainer.loggers:
            logger.log_metrics(manifest.measurements(), step=manifest.training.step)
        if published:
            for listener in self.listeners:
                listener(artifact, manifest)

    def _conclude(self, failure: str | None) -> None:
        """Every rank agrees on what went wrong: stop here if it is meant to."""
        if failure and self.strict:
            self.last_error = failure
            raise RuntimeError(failure)
        self._report(failure)

    def _report(self, failure: str | None) -> None:
        if failure is not None:
            self.last_error = failure or None
        if failure:
            rank_zero_warn(f"{failure}\nTraining goes on; the next validation tries again.")


def _dry_run(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _network_of(pl_module: LightningModule) -> nn.Module:
    """The network that ships, without the wrapper of `torch.compile`."""
    model = getattr(pl_module, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{type(pl_module).__name__} must keep the network that ships in `self.model`"
        )
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def _spec_of(pl_module: LightningModule) -> ExportSpec:
    spec = pl_module.export_spec
    if not isinstance(spec, ExportSpec):
        raise TypeError(f"`export_spec` must be an ExportSpec, not {type(spec).__name__}")
    return spec


def _pixels_of(batch: Any, spec: ExportSpec, count: int = 8) -> Tensor | None:
    """The first 8-bit images of a batch (images, ...); None if they are not of the spec's size."""
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != spec.input_size:
        return None
    return denormalise(images[:count], spec)
