"""What the integer network loses: rounded, corrected, folded with the noise, trained."""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_modules.recipe.finetuning import first_training_images
from lightning_modules.studies.cells import Cells, build, identity, parse, train
from mobileone.bench.results import Result, Row
from mobileone.bench.timing import get_protocol, pinned, time_in_turn, torch_threads
from mobileone.export import ExportSpec, RejectedError, export_model
from mobileone.export.artifact import REJECTED
from mobileone.export.checkpoint import load_model, read_checkpoint
from mobileone.export.formats.table import FORMATS, check_formats
from mobileone.export.manifest import describe_files
from mobileone.export.preprocess import denormalize
from mobileone.io.atomic import atomic_write
from mobileone.io.checksum import file_sha256
from mobileone.quantization import calibrate_quantization

__all__ = ["study_quantization"]

_TIMES = ("latency_ms", "float_latency_ms")
_SIMULATION = "simulation"  # PyTorch, which the files are made from


@dataclass(frozen=True)
class Setting:
    """One line of the study.

    Attributes:
        name: What it is called.
        scheme: `float` or one of the quantization's.
        kwargs: Of the quantization.
        options: Of the training that follows, on the command line, with the float network as
            teacher; None trains nothing.
        timed: Whether its files are timed, next to the float network's.
    """

    name: str
    scheme: str = "int8"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] | None = None
    timed: bool = False

    def key(self) -> str:
        """What decides the result, besides the network."""
        return json.dumps([self.scheme, self.kwargs, self.options], sort_keys=True)


_RUNNING = {"scales": "running"}
_LONGER = ("--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "10")
_FEW_BITS = ("--model.lr", "0.1", *_LONGER)  # weights have far to go

SETTINGS = (
    Setting("float", "float"),
    Setting("rounded", kwargs={"kappa": 0.0}),
    Setting("noise-aware fold", timed=True),
    Setting("trained on frozen statistics", kwargs=_RUNNING, options=()),
    Setting("trained on exact statistics", kwargs=_RUNNING | {"statistics": "exact"}, options=()),
    Setting("trained on BNEst", kwargs=_RUNNING | {"statistics": "diagonal"}, options=()),
    Setting("w4a8 fold", "int4"),
    Setting("w4a8 trained", "int4", options=_FEW_BITS),
    Setting("palette4 trained", "palette4", options=_FEW_BITS),
)


def study_quantization(
    output: str | Path = "quantization",
    weights: Sequence[str] = (),
    config: str = "quickstart",
    models: Sequence[str] = ("mobileone_s0", "mobileone_s1"),
    seeds: int = 3,
    epochs: int = 3,
    formats: Sequence[str] = (),
    settings: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Result:
    """Quantize trained networks in several ways, and count what each gets right in integers.

    Every file is run on all validation images.
    Called again with the same arguments, the study continues where it was ended.

    Args:
        output: Holds cells/ (a file for each network and setting), runs/ and files/.
        weights: Checkpoints of trained networks; those of the same model count as its seeds. Empty
            trains `models` first, each with `seeds` seeds, by `config`.
        config: Configuration of the float training: a file, or the name of a packaged one.
        models: What is trained where no `weights` are given.
        seeds: How often.
        epochs: Length of the quantized trainings; those with weights of 4 bits have ten.
        formats: Integer formats to write and run, for example [onnx_int8]; the simulation alone
            without any.
        settings: Names of the lines wanted; empty for all.
        options: Further options of `mobileone fit` for all trainings, for example
            ["--data.root", "/path/to/images"].

    Returns:
        A row for each model, setting and runtime, `simulation` (PyTorch) among these: `n`
        networks, `acc1_mean`, `acc1_std` (percent; None for one), `agreement_mean` (percent of
        the images with the simulation's class), `megabytes`, `refused`: how many files an export
            would not have published, and of one setting `latency_ms` and `float_latency_ms`.

    Raises:
        ValueError: An argument is out of its range, or the folder holds another study's cells.
        SystemExit: The options cannot be used; the message has been printed.
    """
    if epochs < 1 or seeds < 1:
        raise ValueError(f"`epochs` (={epochs}) and `seeds` (={seeds}) must be at least 1")
    known = [setting.name for setting in SETTINGS]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"unknown `settings` {unknown}: choose from {known}")
    chosen = [setting for setting in SETTINGS if not settings or setting.name in settings]
    if formats:
        check_formats(formats)
    directory = Path(output).expanduser().absolute()
    options = (*options, "--wandb.group", f"quantization-{directory.name}")
    work = _Work(directory, config, options, formats, epochs)
    networks = [*map(_Network.of, weights)] or [
        work.train_float(model, seed) for model in models for seed in range(seeds)
    ]
    plan = [(network, setting) for network in networks for setting in chosen]
    found: dict[tuple[str, str], list[Row]] = {}
    for done, (network, setting) in enumerate(plan, 1):
        print(f"{done}/{len(plan)}: {network.name}, {setting.name}", flush=True)
        for runtime, cell in work.cell(network, setting).items():
            found.setdefault((network.model, setting.name), []).append({"runtime": runtime} | cell)
    names = list(dict.fromkeys(network.model for network in networks))
    how: dict[str, Any] = {"config": config, "options": list(options), "epochs": epochs}
    how["networks"] = {name: [n.sha256 for n in networks if n.model == name] for name in names}
    rows = [row for (model, name), cells in found.items() for row in _rows(model, name, cells)]
    return Result.new("quantization", how, rows)


@dataclass(frozen=True)
class _Network:
    """A trained network in floating point.

    Attributes:
        checkpoint: Its file.
        model: timm's name.
        sha256: Of the file.
    """

    checkpoint: Path
    model: str
    sha256: str

    @classmethod
    def of(cls, file: str | Path) -> "_Network":
        path = Path(file).expanduser().absolute()
        contents = read_checkpoint(path)
        return cls(path, load_model(contents, path)[1].model_name, file_sha256(path))

    @property
    def name(self) -> str:
        """For people: the file may be called like others."""
        return f"{self.model} ({self.checkpoint.name})"


class _Work:
    """Trains, folds, writes and measures; what is finished is read."""

    def __init__(
        self,
        directory: Path,
        config: str,
        options: Sequence[str],
        formats: Sequence[str],
        epochs: int,
    ) -> None:
        self.directory, self.formats = directory, formats
        self.float = ("--config", config, *options)
        self.quantized = ("--config", config, "--config", "quantize", *options)
        self.quantized += ("--trainer.max_epochs", str(epochs))
        self.quantized += ("--trainer.check_val_every_n_epoch", str(epochs))
        parsed = parse(self.quantized)
        del parsed["checkpoint"]  # which files are written does not change a network
        self.cells = Cells(directory / "cells", identity(parsed))

    def train(self, name: str, argv: Sequence[str]) -> Path:
        """The checkpoint of a training, trained unless it is there."""
        final = self.directory / "networks" / f"{name}.ckpt"
        if not final.is_file():
            trainer = train(argv, self.directory / "runs", name)
            last = cast(Any, trainer.checkpoint_callback).last_model_path
            with atomic_write(final) as partial:
                shutil.copyfile(last, partial)
        return final

    def train_float(self, model: str, seed: int) -> _Network:
        """A network to begin with."""
        print(f"{model}, seed {seed}", flush=True)
        argv = [*self.float, "--model.model", model, "--seed_everything", str(seed)]
        return _Network.of(self.train(f"{model}-{seed}", argv))

    def cell(self, network: _Network, setting: Setting) -> dict[str, Row]:
        """What a setting makes of a network, by runtime; what is missing is measured."""
        key = json.dumps([network.sha256, setting.key()])
        known = (self.cells.read(key, 0) or {}).get("measured", {})
        wanted = [_SIMULATION, *_formats(self.formats, setting.scheme)]
        if missing := [runtime for runtime in wanted if runtime not in known]:
            name = self.cells.path(key, 0).stem
            known |= self._measure(network, setting, name, missing)
            self.cells.write(key, 0, {"name": setting.name, "measured": known})
        return {runtime: known[runtime] for runtime in wanted}

    def _measure(
        self, network: _Network, setting: Setting, name: str, wanted: Sequence[str]
    ) -> dict[str, Row]:
        formats = _formats(self.formats, setting.scheme)
        argv = [*self.quantized, "--model.model", network.model]
        argv += ["--model.weights", str(network.checkpoint)]
        argv += ["--model.quantize", "null" if setting.scheme == "float" else setting.scheme]
        argv += ["--model.quantize_kwargs", json.dumps(setting.kwargs)]
        argv += ["--checkpoint.formats", json.dumps(formats)] if formats else []
        built = build(argv)
        data, model = built.datamodule, built.model.model
        spec = ExportSpec(network.model, tuple(data.class_names), **data.data_config)
        if setting.options is not None:
            argv += ["--model.teacher", network.model]
            argv += ["--model.teacher_weights", str(network.checkpoint)]
            checkpoint = self.train(name, [*argv, *setting.options])
            model, _ = load_model(read_checkpoint(checkpoint), checkpoint)
        elif setting.scheme != "float":
            batches = first_training_images(data, next(model.parameters()))
            calibrate_quantization(model, batches, mean=spec.mean, std=spec.std)
        images = denormalize(next(iter(data.val_dataloader()))[0], spec)
        folder = self.directory / "files" / name
        files = {
            format: _write(model, spec, format, folder / format, images)
            for format in wanted
            if format != _SIMULATION
        }
        found = _accuracies(model.eval(), spec, files, data)
        if setting.timed and files:
            model, _ = load_model(read_checkpoint(network.checkpoint), network.checkpoint)
            for format, path in files.items():
                like = format.removesuffix("_int8")
                pair = {like: _write(model, spec, like, folder / like, images), format: path}
                times = _latencies(pair, spec, images[:1])
                found[format] |= {"latency_ms": times[format], "float_latency_ms": times[like]}
        return found


def _write(model: nn.Module, spec: ExportSpec, format: str, folder: Path, images: Tensor) -> Path:
    """The file of a format, also one that is refused."""
    try:
        export_model(model, spec, folder, [format], images=images, overwrite=True)
    except RejectedError as error:
        if not error.final:  # there is no file
            raise
        folder = folder.with_name(folder.name + REJECTED)
    return folder / FORMATS[format].filename


def _latencies(files: Mapping[str, Path], spec: ExportSpec, image: Tensor) -> dict[str, float]:
    """The shortest time of an image, in ms, from 8-bit pixels on, the files in turn, one thread."""
    loaders = {
        name: partial(partial, FORMATS[name].runner(path, spec), image)
        for name, path in files.items()
    }
    with torch_threads(1), pinned(1):
        times = time_in_turn(loaders, get_protocol("paper", runs=200))
    return {name: 1e3 * min(values) for name, values in times.items()}


def _formats(names: Sequence[str], scheme: str) -> list[str]:
    """The formats of a quantized network; of a float one those that the integer ones are like."""
    return [name.removesuffix("_int8") for name in names] if scheme == "float" else list(names)


@torch.no_grad()
def _accuracies(
    model: nn.Module, spec: ExportSpec, files: Mapping[str, Path], data: Any
) -> dict[str, Row]:
    """Accuracy of the network and of its files on all validation images, in percent."""
    runners = {name: FORMATS[name].runner(path, spec) for name, path in files.items()}
    counts = {name: torch.zeros(2) for name in (_SIMULATION, *runners)}
    seen = 0
    for images, targets in data.val_dataloader():
        expected = model(images).argmax(dim=1)
        pixels = denormalize(images, spec)
        seen += len(images)
        for name, count in counts.items():
            found = expected if name == _SIMULATION else runners[name](pixels).argmax(dim=1)
            count += torch.tensor([(found == targets).sum(), (found == expected).sum()])
    sizes = {name: _megabytes(path) for name, path in files.items()}
    return {
        name: {
            "acc1": 100 * float(right) / seen,
            "agreement": 100 * float(alike) / seen,
            "megabytes": sizes.get(name),
            "refused": float(name in files and files[name].parent.name.endswith(REJECTED)),
        }
        for name, (right, alike) in counts.items()
    }


def _megabytes(path: Path) -> float:
    return sum(file["bytes"] for file in describe_files(path).values()) / 1e6


def _rows(model: str, setting: str, cells: Sequence[Row]) -> list[Row]:
    """A row for each runtime, over the networks."""
    rows = []
    for runtime in dict.fromkeys(cell["runtime"] for cell in cells):
        own = [cell for cell in cells if cell["runtime"] == runtime]
        accuracies = [cell["acc1"] for cell in own]
        rows.append(
            {
                "model": model,
                "setting": setting,
                "runtime": runtime,
                "n": len(own),
                "acc1_mean": statistics.mean(accuracies),
                "acc1_std": statistics.stdev(accuracies) if len(own) > 1 else None,
                "agreement_mean": statistics.mean(cell["agreement"] for cell in own),
                "megabytes": own[0]["megabytes"],
                "refused": round(sum(cell["refused"] for cell in own)),
                **{key: min(cell[key] for cell in own) for key in _TIMES if key in own[0]},
            }
        )
    return rows
