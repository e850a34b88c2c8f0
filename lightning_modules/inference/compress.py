"""Compress a checkpoint's network, and measure each method on the validation images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.data.image_io import find_images
from lightning_modules.inference.predict import read_pixels
from mobileone.export import ExportSpec
from mobileone.export.checkpoint import load_model, read_checkpoint
from mobileone.export.compress.methods import Row, compress_model

__all__ = ["compress_checkpoint", "format_rows"]


def compress_checkpoint(
    checkpoint: str | Path,
    data: str | Path,
    directory: str | Path,
    *,
    methods: Sequence[str] | None = None,
    calibration: int = 128,
    limit: int | None = None,
) -> list[Row]:
    """Write compressed files of a checkpoint and a table of what they cost.

    Args:
        checkpoint: the ``.ckpt`` file.
        data: folder with ``train/<class>/*`` (for calibration) and ``val/<class>/*`` (for
            accuracy).
        directory: the folder to create.
        methods: of coreml_palette6, coreml_palette4_corrected, onnx_int8, coreml_int8,
            executorch_int8 and litert_int8; null for the first four.
        calibration: how many training images the ranges of activations are taken from.
        limit: at most this many validation images; null for all.

    Raises:
        FileNotFoundError: no such checkpoint or images.
        FileExistsError: ``directory`` exists.
        ValueError: the checkpoint, an argument or the data cannot be used.
    """
    if calibration < 1:
        raise ValueError(f"calibration={calibration} must be at least 1.")
    path, root = Path(checkpoint), Path(data)
    model, spec = load_model(read_checkpoint(path), path)
    train = _spread(find_images(root / "train"), calibration)
    images, targets = _labeled(root / "val", spec, limit)
    return compress_model(
        model.eval(), spec, Path(directory), read_pixels(train, spec), images, targets, methods
    )


def format_rows(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [
        "| method | size | top-1 | same class as float32 | worst probability error |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.method}` | {r.bytes / 1e6:.2f} MB | {r.accuracy:.2%} | {r.agreement:.2%} | "
        f"{r.worst_error:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _labeled(folder: Path, spec: ExportSpec, limit: int | None) -> tuple[Tensor, Tensor]:
    """Validation images and their classes, from the names of their folders."""
    files = find_images(folder)
    files = files if limit is None else _spread(files, limit)
    position = {name: index for index, name in enumerate(spec.class_names)}
    names = [file.relative_to(folder).parts[0] for file in files]
    if unknown := sorted(set(names) - set(position)):
        raise ValueError(
            f"{str(folder)!r} has folders that are not classes of the model: {unknown[:5]}; the "
            f"classes are {list(spec.class_names[:5])}, ..."
        )
    return read_pixels(files, spec), torch.tensor([position[name] for name in names])


def _spread(files: list[Path], count: int) -> list[Path]:
    """At most `count` files, evenly over the list, which is sorted by class."""
    return files[:: max(1, len(files) // count)][:count]
