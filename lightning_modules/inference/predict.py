"""Classify files of images into a CSV, from a checkpoint or from an exported artifact."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_modules.data.image_io import (
    color_mode,
    find_images,
    open_image,
    read_image,
    why_unreadable,
)
from lightning_modules.data.transforms import Transform, eval_transform
from lightning_modules.data.workers import worker_options
from mobileone.bench.timing import check_device
from mobileone.export import FORMATS, ExportSpec, load_runner
from mobileone.export.checkpoint import load_model, read_checkpoint
from mobileone.export.formats import torchscript
from mobileone.export.load import Loaded, is_file_of_artifact
from mobileone.export.manifest import MANIFEST_NAME
from mobileone.export.preprocess import normalize
from mobileone.io.safe_pickle import UnsafeFileError

__all__ = [
    "PredictionSummary",
    "load_classifier",
    "predict_folder",
    "read_pixels",
]

# 8-bit images (N, C, H, W) -> probabilities (N, classes) on the CPU
Classifier = Callable[[Tensor], Tensor]
_CPU = torch.device("cpu")

_SOURCES = (
    "a checkpoint (….ckpt) of one of your runs, an artifact folder (the one with manifest.json), "
    "or a file of one"
)


@dataclass(frozen=True)
class PredictionSummary:
    """What `predict_folder` did.

    Attributes:
        output: the CSV file.
        images: how many images were classified.
        unreadable: path and reason of each file that could not be read.
    """

    output: Path
    images: int
    unreadable: tuple[tuple[str, str], ...]


def predict_folder(
    source: str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    format: str | None = None,
    top_k: int | None = 1,
    skip_unreadable: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    progress: bool = True,
    overwrite: bool = False,
) -> PredictionSummary:
    """Classify images and write one CSV row an image, in the order of their paths.

    The images go through the evaluation transform that the model was validated with. The columns
    are path, label, probability; then label_2, probability_2 … up to ``top_k``, or, if it is
    None, one column ``p(<class>)`` for every class; then error, the reason why a file could not
    be read (its other columns are empty). The file appears when it is complete; rows written
    before an interruption stay next to it in ``<output>.partial``.

    Args:
        source: a checkpoint (``.ckpt``), an artifact folder, or a file of one.
        images: a folder (searched recursively), an image, a glob pattern, or a list of these.
        output: the CSV file to write (UTF-8); its folder is created.
        format: which file of an artifact folder runs, a name of `mobileone.export.FORMATS`; None
            takes the first that this machine can run. Core ML files run anywhere, though slowly
            off a Mac.
        top_k: how many classes to name; None for the probabilities of all of them.
        skip_unreadable: leave unreadable files out of the CSV; the summary still names them.
        batch_size: images a step.
        num_workers: processes that read images.
        device: for torch, or "auto" for the GPU if there is one.
        progress: show a bar.
        overwrite: replace ``output`` if it exists.

    Raises:
        FileNotFoundError: no such source, no such images.
        FileExistsError: ``output`` exists.
        ValueError: a source or device that cannot be used, an argument out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if Path(output).is_dir():
        raise ValueError(f"output={str(output)!r} is a folder: give the CSV file to write.")
    if Path(output).exists() and not overwrite:
        raise FileExistsError(
            f"output={str(output)!r} exists: give another file, or --overwrite true."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    paths = find_images(images)
    classify, spec = load_classifier(source, format, torch.device(device))
    if top_k is not None and not 1 <= top_k <= spec.num_classes:
        raise ValueError(
            f"top_k={top_k} must be from 1 to the {spec.num_classes} classes of the model, or null "
            "for the probabilities of all classes."
        )
    reading = worker_options(num_workers)
    loader = DataLoader(_Files(paths, spec), batch_size, collate_fn=_collate, **reading)
    console = Console(stderr=True)
    unreadable: list[tuple[str, str]] = []
    as_row = partial(_row, names=spec.class_names, top_k=top_k)
    with _csv_file(Path(output), [*as_row("", torch.zeros(spec.num_classes)), "error"]) as table:
        for batch in track(loader, "Classifying", disable=not progress, console=console):
            rows = iter(() if batch.images is None else classify(batch.images))
            for path, error in zip(batch.paths, batch.errors, strict=True):
                if error is None:
                    table.writerow(as_row(path, next(rows)))
                    continue
                unreadable.append((path, error))
                if not skip_unreadable:
                    table.writerow({"path": path, "error": error})
    return PredictionSummary(Path(output), len(paths) - len(unreadable), tuple(unreadable))


@contextmanager
def _csv_file(path: Path, columns: Sequence[str]) -> Iterator["csv.DictWriter[str]"]:
    """Write rows to ``<path>.partial``, which is renamed to ``path`` at a regular end.

    The file is UTF-8; bytes of file names that are not UTF-8 are kept.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        yield writer
    unfinished.replace(path)


def _row(
    path: str, probabilities: Tensor, names: Sequence[str], top_k: int | None
) -> dict[str, str]:
    """One classified image: its best classes, or the best one and all ``probabilities``."""
    row = {"path": path}
    best = probabilities.topk(top_k or 1)
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    for rank, (index, value) in enumerate(found, 1):
        end = "" if rank == 1 else f"_{rank}"
        row |= {f"label{end}": names[index], f"probability{end}": f"{value:.6g}"}
    if top_k is None:
        pairs = zip(names, probabilities.tolist(), strict=True)
        row |= {f"p({name})": f"{value:.6g}" for name, value in pairs}
    return row


def load_classifier(
    source: str | Path, format: str | None = None, device: torch.device = _CPU
) -> tuple[Classifier, ExportSpec]:
    """The model as a function, and its spec.

    A checkpoint gives the weights of its ``state_dict``: the averaged ones if there are any.

    Args:
        source: a checkpoint, an artifact folder, or a file of one.
        format: which file of a folder; None takes the first that can run.
        device: for checkpoints and TorchScript; the other files run on the CPU.

    Raises:
        FileNotFoundError: no such checkpoint, artifact folder or file in it.
        ValueError: a source that is neither, is damaged or cannot be run.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist. Give {_SOURCES}.")
    if path.name == MANIFEST_NAME:
        path = path.parent
    if path.is_dir() or is_file_of_artifact(path):
        loaded = load_runner(path, format)
        if loaded.format == "torchscript" and not loaded.spec.pixels:
            return _on(torchscript.load(loaded.file), loaded.spec, device), loaded.spec
        return _of_file(loaded), loaded.spec
    if format is not None:
        raise ValueError(f"format={format!r} is for artifact folders; {str(path)!r} is a file.")
    model, spec = load_model(_contents(path), path)
    return _on(model.eval(), spec, device), spec


def _on(model: nn.Module, spec: ExportSpec, device: torch.device) -> Classifier:
    """A model of normalized images -> logits, run on `device`."""
    model = model.to(device)

    @torch.inference_mode()
    def classify(images: Tensor) -> Tensor:
        return model(normalize(images.to(device), spec)).float().softmax(dim=1).cpu()

    return classify


def _of_file(loaded: Loaded) -> Classifier:
    """A file that returns logits or probabilities."""

    def classify(images: Tensor) -> Tensor:
        output: Tensor = loaded.run(images)
        logits = FORMATS[loaded.format].returns(loaded.spec) == "logits"
        return output.softmax(dim=1) if logits else output

    return classify


def read_pixels(paths: Sequence[Path], spec: ExportSpec) -> Tensor:
    """Images as the model sees them, resized and cropped: 8-bit, (N, C, H, W).

    Raises:
        ValueError: one cannot be read.
    """
    files, pixels = _Files(list(paths), spec), []
    for index in range(len(files)):
        path, image, error = files[index]
        if image is None:
            raise ValueError(f"{path} cannot be read: {error}")
        pixels.append(image)
    return torch.stack(pixels)


def _contents(path: Path) -> dict[str, Any]:
    """A checkpoint that can be predicted from."""
    try:
        contents = read_checkpoint(path)
    except UnsafeFileError:
        raise
    except ValueError as error:  # it reports what torch makes of the file
        raise ValueError(_no_checkpoint(path)) from error
    if "export_spec" not in contents:
        raise ValueError(_no_checkpoint(path))
    return contents


def _no_checkpoint(path: Path) -> str:
    return (
        f"{str(path)!r} is not a checkpoint of a training with `mobileone fit`, or it is damaged. "
        f"Give {_SOURCES}."
    )


class _Batch(NamedTuple):
    """Files, why each could not be read (None if it could), and the readable ones stacked."""

    paths: list[str]
    errors: list[str | None]
    images: Tensor | None


class _Files(Dataset[tuple[str, Tensor | None, str | None]]):
    """Path, 8-bit image (C, H, W) as the model sees it, error: one of the last two is None."""

    def __init__(self, paths: list[Path], spec: ExportSpec) -> None:
        config = asdict(spec)
        del config["model_name"], config["class_names"], config["pixels"]
        self.paths = paths
        self.transform: Transform = eval_transform(config, normalize=False)
        self.mode = color_mode(spec.input_size[0])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        path = self.paths[index]
        try:
            with open_image(path) as file:
                image = read_image(file, self.mode)
        except Exception as error:  # whatever a decoder raises
            return str(path), None, why_unreadable(error)
        return str(path), self.transform(image), None


def _collate(items: list[tuple[str, Tensor | None, str | None]]) -> _Batch:
    paths, images, errors = zip(*items, strict=True)
    readable = [image for image in images if image is not None]
    return _Batch(list(paths), list(errors), torch.stack(readable) if readable else None)
