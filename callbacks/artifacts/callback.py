"""After each validation: a checkpoint, and from its weights the fused files that ship."""

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from callbacks.artifacts.folder import CheckpointFolder
from callbacks.artifacts.publisher import ExportQueue, Listener, Publisher
from callbacks.artifacts.shipped import (
    Architecture,
    architecture,
    get_network,
    get_spec,
    images_due,
    images_uint8,
    rebuilt,
)
from callbacks.checkpointing import AtomicCheckpoint, on_rank_zero
from callbacks.dry_run import is_dry_run
from callbacks.signals import ForceQuit, interruptible
from mobileone.export import ExportJob, Metadata
from mobileone.export.checkpoint import IMAGES_KEY
from mobileone.export.formats.table import (
    DEFAULT_FORMATS,
    check_formats,
    check_integers,
    check_packages,
)
from mobileone.export.worker import ExportResult, Status
from mobileone.quantization import scheme_of

__all__ = ["ReparameterizeOnSave"]

_CONTINUES: Mapping[Status, str] = {
    "published": "Training continues.",
    "rejected": "Training continues; the next validation exports its own checkpoint.",
    "failed": "Training continues; the next validation exports again.",
}
_AGAIN = "mobileone export CHECKPOINT FOLDER writes other formats of it."
_STOPS: Mapping[Status, str] = {
    "published": f"The checkpoint is complete: {_AGAIN}",
    "rejected": f"The checkpoint is complete: {_AGAIN}",
    "failed": "The checkpoint is complete; the run exports again when it is continued.",
}


class ReparameterizeOnSave(AtomicCheckpoint):
    """Save a checkpoint and its fused artifact after every validation of a fit.

    ```
    <dirpath>/epoch=003-step=000400.ckpt    training checkpoint
    <dirpath>/epoch=003-step=000400/        model.torchscript.pt, model.mlpackage, manifest.json
    <dirpath>/last.ckpt, last/, best.ckpt, best/    relative links
    ```

    The artifact is built from the checkpoint file: its `state_dict` (the averaged weights where
    weights are averaged), in the network that its hyper-parameters name. Where these do not give
    the module's network, the network itself is copied for its architecture.

    Each new file appears complete, then the links move, then what is neither the last nor among
    the best is removed: a kill at any moment leaves a usable last checkpoint and artifact. One
    process may write to a `dirpath` at a time.

    The module must keep its network in `self.model` and offer an `export_spec`
    (`mobileone.export.ExportSpec`). Strategies that write one checkpoint file are supported.

    With `background`, a worker process exports the checkpoint on the CPU while training continues.
    The next validation waits for it, and so does the end of the fit; a worker that dies or hangs is
    a failed export.

    Every format is compared with the network on 64 validation images or, of integers, 128, evenly
    from all batches, which are kept in the checkpoint for later exports (unless
    `save_weights_only`). A file above its format's tolerance, or that cannot be written, is left
    out: the manifest says why, and the file stays in `<name>.rejected/` for a look. If that is so
    of all files, the export has failed. Errors and sizes go to the loggers as
    `export/<format>/...`.

    Args:
        monitor: metric that ranks the checkpoints.
        mode: `max` if more is better, `min` if less is.
        save_top_k: how many of the best to keep next to the last; -1 keeps all, 0 only the last.
        dirpath: folder for it all; None takes `checkpoints` in the logger's folder, or in the
            trainer's `default_root_dir`.
        filename: name of a checkpoint; must contain `{step}`, so that names differ.
        formats: formats of the artifact, names from `mobileone.export.FORMATS`.
        pixels: TorchScript, `.pt2` and ONNX files take pixel values 0..255 and return
            probabilities, as files for devices do, instead of normalized images and logits.
        metadata: author, license, description and version for the artifact.
        strict: raise when a file cannot be published. Otherwise training continues with a warning,
            the error is kept in `last_error` and in the manifest, or next to the checkpoint if
            there is no file at all, and the next validation exports again.
        background: export in a worker process while training continues.
        timeout: seconds after which a worker is stopped.
        save_weights_only: leave optimizers, schedulers and callbacks out of the checkpoints.

    Attributes:
        last_error: why the last export has no file in a format, or None.
        listeners: called on rank 0 with the folder and the manifest of each published artifact,
            after the links have moved.

    Raises:
        ValueError: an unknown format, or a `filename` without `{step}` or with a field that cannot
            be; before a fit, a format that
            cannot hold the network: integers for one of floats, or the reverse.
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
        pixels: bool = False,
    ) -> None:
        self._fields = _fields(filename)
        if "step" not in self._fields:
            raise ValueError(f"`filename` (={filename!r}) must contain {{step}}: names must differ")
        if timeout <= 0:
            raise ValueError(f"`timeout` (={timeout}) must be greater than 0 seconds")
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
        self.formats, self.pixels = check_formats(formats), pixels
        self.metadata = metadata or Metadata()
        self.strict = strict
        self.background, self.timeout = background, timeout
        self.last_error: str | None = None
        self._publisher: Publisher | None = None
        self._at_leaving = contextlib.ExitStack()
        self._collected: list[Tensor] = []
        self._enough = False
        self._rebuilt: Architecture | None = None
        self.listeners: list[Listener] = []

    # -- What others may ask -----------------------------------------------------------------

    @property
    def artifact_path(self) -> Path | None:
        """Folder of the newest artifact, or None."""
        return self._folder.linked_artifact("last") if self.dirpath else None

    @property
    def best_artifact_path(self) -> Path | None:
        """Folder of the best checkpoint's artifact, or None."""
        return self._folder.linked_artifact("best") if self.dirpath else None

    def check_network(self, pl_module: LightningModule, *, written: bool = True) -> None:
        """Make sure that the formats can hold the network, and, if they are written, can be here.

        Raises:
            ValueError: one is for the other kind of networks, of integers or of floats.
            ImportError: a package is missing; names the pip command.
        """
        scheme = None
        if isinstance(getattr(pl_module, "model", None), nn.Module):
            scheme = scheme_of(get_network(pl_module))
            check_integers(self.formats, scheme is not None)
        if written:
            check_packages(self.formats, scheme=scheme)

    def check_names(self, logged: Collection[str]) -> None:
        """Make sure that what is monitored, and what the file names state, is logged.

        Args:
            logged: names of all that is.

        Raises:
            ValueError: something is not.
        """
        for option, names in (("monitor", [str(self.monitor)]), ("filename", self._fields)):
            missing = sorted(set(names) - {"epoch", "step", *logged})
            if missing:
                raise ValueError(self._not_logged(option, missing[0], logged))

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
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.check_network(pl_module, written=not is_dry_run(trainer))
        if is_dry_run(trainer):
            return
        # before a checkpoint is restored, which takes time and reports nothing
        failure = on_rank_zero(trainer, lambda: self._take_folder(trainer, pl_module))
        if failure:
            raise RuntimeError(failure)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        get_network(pl_module), get_spec(pl_module)  # better now than after an epoch
        if is_dry_run(trainer):
            return
        if trainer.is_global_zero:
            self._rebuilt = rebuilt(pl_module)
        if trainer.ckpt_path is not None:
            self._report(self._on_rank_zero(trainer, lambda: self._held.recover()))
        elif self._publisher is not None:
            self._publisher.warn_if_not_empty()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep images of all batches of the fit's first validation to compare the files on."""
        if trainer.sanity_checking or not trainer.is_global_zero or self._enough:
            return
        # integers may differ in a class of a hundred
        count = 64 if scheme_of(get_network(pl_module)) is None else 128
        left = count - sum(map(len, self._collected))
        due = min(left, images_due(batch_idx, sum(trainer.num_val_batches), count))
        found = images_uint8(batch, get_spec(pl_module), due) if due else None
        if found is not None:
            self._collected.append(found)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of metrics, before an epoch is spent.

        Raises:
            ValueError: one has the prefix of this validation's metrics, and is none of them.
        """
        known = set(trainer.callback_metrics)
        prefixes = {name.partition("/")[0] for name in known if "/" in name}
        names = {str(self.monitor), *self._fields}
        self.check_names(known | {n for n in names if n.partition("/")[0] not in prefixes})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """So that a later export of the file alone is compared on the same images."""
        if self._collected:
            checkpoint[IMAGES_KEY] = torch.cat(self._collected)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in an export that has ended; validate if the fit ends without a result otherwise."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.last_model_path and _ends_here(trainer):
            every = trainer.check_val_every_n_epoch
            self._at_leaving.callback(setattr, trainer, "check_val_every_n_epoch", every)
            trainer.check_val_every_n_epoch, trainer.should_stop = 1, True
        publisher = self._publisher
        if publisher is None or self.strict:  # strict: all ranks stop at the next validation
            return
        self._report(_attempt(publisher.poll))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last export."""
        super().on_train_end(trainer, pl_module)
        if is_dry_run(trainer):
            return
        self._conclude(self._on_rank_zero(trainer, self._drain), _STOPS)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let a running export end, unless a second Ctrl-C asks to stop at once."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, ForceQuit):
            self._report(self._drain_patiently(), _STOPS)
        self._leave()  # after Ctrl-C Lightning does not tear callbacks down

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no process and no lock behind."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or is_dry_run(trainer):
            return
        self._enough = bool(self._collected)
        metrics = self._monitor_candidates(trainer)
        path, score, self.best_k_models = trainer.strategy.broadcast(
            (self.format_checkpoint_name(metrics), self._score(metrics), self.best_k_models)
        )
        before = {**super().state_dict()}
        earlier = [path for path in (*self.best_k_models, self.last_model_path) if path]
        self._rank(path, score)
        try:
            self._save_checkpoint(trainer, path)
        except BaseException:
            self._restore(before)
            raise
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        result = self._on_rank_zero(trainer, lambda: self._held.publish(path, logged, earlier))
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._conclude(result)

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

    @property
    def _held(self) -> Publisher:
        assert self._publisher is not None
        return self._publisher

    def _score(self, metrics: dict[str, Tensor]) -> Tensor:
        """The monitored value."""
        if self.monitor not in metrics:
            raise ValueError(self._not_logged("monitor", str(self.monitor), metrics))
        return torch.tensor(float(metrics[self.monitor]))

    def _not_logged(self, option: str, name: str, logged: Collection[str]) -> str:
        given = self.monitor if option == "monitor" else self.filename
        own = {str(self.monitor), *self._fields, "epoch", "step"}
        return (
            f"`{option}` (={given!r}) names {name!r}, which is not logged (valid names: "
            f"{', '.join(sorted(set(logged) - own))}): take one of them, or log it in "
            "`validation_step`"
        )

    def _rank(self, path: str, score: Tensor) -> None:
        """Enter a checkpoint, unless its value is NaN; of equal ones the older stays ahead."""
        scores = {p: s for p, s in self.best_k_models.items() if p != path}
        if not math.isnan(score):
            scores[path] = score
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

    def _take_folder(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Make sure that nobody else writes there."""
        try:
            self._publisher = Publisher(
                trainer,
                self._folder,
                ExportQueue(self._folder, self.background, self.timeout),
                partial(self._job, pl_module),
                lambda: (self.last_model_path, list(self.best_k_models)),
                self.listeners,
                lambda old, last: self._should_remove_checkpoint(trainer, old, last),
            )
        except FileExistsError as error:
            return str(error)
        return None

    def _leave(self) -> None:
        self._at_leaving.close()
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _job(
        self, pl_module: LightningModule, checkpoint: str, metrics: Mapping[str, float] | None
    ) -> ExportJob:
        """The export of a checkpoint; of one from before a kill only the score is known."""
        network = get_network(pl_module)
        score = self.best_k_models.get(checkpoint)
        known = {} if score is None else {str(self.monitor): float(score)}
        return ExportJob(
            Path(checkpoint),
            CheckpointFolder.artifact_of(checkpoint),
            self.formats,
            self.metadata,
            overwrite=True,
            metrics=known if metrics is None else metrics,
            spec=get_spec(pl_module),
            images=torch.cat(self._collected) if self._collected else None,
            network=None if architecture(network) == self._rebuilt else network,
            pixels=self.pixels,
        )

    def _drain(self) -> ExportResult | None:
        return self._publisher.drain() if self._publisher is not None else None

    def _drain_patiently(self) -> ExportResult | None:
        """Wait for exports of a run that stops; Ctrl-C ends them and the wait."""
        if self._publisher is not None and self._publisher.exports.under_way:
            rank_zero_info("waiting for the export of the last checkpoint; Ctrl-C leaves it out")
        try:
            with interruptible():
                return _attempt(self._drain)
        except KeyboardInterrupt:
            reason = "the export of the last checkpoint was left out"
            return ExportResult(self.last_model_path, "failed", reason=reason)

    @staticmethod
    def _on_rank_zero(
        trainer: Trainer, work: Callable[[], ExportResult | None]
    ) -> ExportResult | None:
        """Run `work` on rank 0; every rank gets the result, so that all continue or all stop."""
        result = _attempt(work) if trainer.is_global_zero else None
        return trainer.strategy.broadcast(result)

    def _conclude(
        self, result: ExportResult | None, then: Mapping[Status, str] = _CONTINUES
    ) -> None:
        """Every rank agrees on the result: stop here if it is meant to."""
        if result and result.reason and self.strict:
            self.last_error = result.reason
            raise RuntimeError(result.reason)
        self._report(result, then)

    def _report(self, result: ExportResult | None, then: Mapping[Status, str] = _CONTINUES) -> None:
        if result is None:
            return
        self.last_error = result.reason
        if result.reason:
            rank_zero_warn(f"{result.reason}\n{then[result.status]}")


def _fields(filename: str) -> list[str]:
    """The metrics that a pattern of file names states.

    Raises:
        ValueError: it is none, or a metric cannot be written like that.
    """
    fields = []
    try:
        for _, name, how, _ in Formatter().parse(filename):
            if name is not None:
                format(1 if name in ("epoch", "step") else 1.0, how or "")
                fields.append(name)
    except ValueError as error:
        raise ValueError(
            f"`filename` (={filename!r}) cannot be filled in ({error}): give braces with a name, "
            "and a format if needed, such as {epoch:03d}-{step:06d}-{val/acc1:.2f}"
        ) from error
    return fields


def _ends_here(trainer: Trainer) -> bool:
    """Whether no training step follows this one."""
    step, epochs = trainer.global_step, trainer.current_epoch + trainer.is_last_batch  # complete
    ends = step >= trainer.max_steps > 0 or epochs >= (trainer.max_epochs or 0) > 0
    least = step >= (trainer.min_steps or 0) and epochs >= (trainer.min_epochs or 0)
    stops = trainer.should_stop and least  # by `max_time`, or by another callback
    return not is_dry_run(trainer) and (ends or stops)


def _attempt(work: Callable[[], ExportResult | None]) -> ExportResult | None:
    """Run `work`; an exception, as a listener may raise, is a failed result."""
    try:
        return work()
    except Exception as error:
        return ExportResult("", "failed", reason=f"{type(error).__name__}: {error}")
