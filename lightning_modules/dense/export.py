"""Export of a trained segmentation or detection network, fused as a whole."""

import io
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchvision.models.detection.ssd import SSD

from lightning_modules.data.transforms import resolve_config
from lightning_modules.dense.models import Detector, Segmenter
from mobileone.dense import fuse
from mobileone.dense.detection import SSDBoxes
from mobileone.export.checkpoint import read_checkpoint
from mobileone.export.dense.export import BOXES, MAPS, export_dense
from mobileone.export.manifest import Manifest, TrainingState
from mobileone.export.spec import ExportSpec

__all__ = ["WHOLE_DETECTOR", "export_detector", "export_segmenter"]

WHOLE_DETECTOR = "detector.torchscript.pt"
_FORMATS = ("torchscript", "coreml")


def export_segmenter(
    checkpoint: str | Path,
    directory: str | Path,
    size: int = 512,
    formats: Sequence[str] = _FORMATS,
) -> Manifest:
    """Write a segmentation checkpoint's fused network, compared with it, and a manifest.

    Core ML takes one RGB image, the other formats take normalized images (N, 3, size, size); all
    return logits (N, classes, size, size).

    Args:
        checkpoint: written by `mobileone segment fit`.
        directory: the folder to make.
        size: side of the images in pixels, a multiple of 32.
        formats: of torchscript, torch_export, onnx and coreml.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the folder is not empty.
        ValueError: the size cannot be used, or a file computes something else than the network.
    """
    if size < 32 or size % 32:
        raise ValueError(f"size={size} must be a multiple of 32.")
    module, run = _load(Segmenter, checkpoint)
    return export_dense(_fused(module), _spec(module, size), directory, MAPS, formats, run)


def export_detector(
    checkpoint: str | Path, directory: str | Path, formats: Sequence[str] = _FORMATS
) -> Manifest:
    """Write a detection checkpoint's fused network, compared with it, and a manifest.

    Core ML's package takes one RGB image of the training's size and ends with non-maximum
    suppression, as Vision expects it. The other formats take normalized images (N, 3, size, size)
    and return all anchors' boxes (N, A, 4), as corners in 0..1, and probabilities (N, A, classes).
    `detector.torchscript.pt` is everything, from a list of images (3, H, W) in 0..1 to boxes in
    pixels after suppression; it needs torchvision's operators where it runs.

    Args:
        checkpoint: written by `mobileone detect fit`.
        directory: the folder to make.
        formats: of torchscript, torch_export, onnx and coreml.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the folder is not empty.
        ValueError: a file computes something else than the network.
    """
    module, run = _load(Detector, checkpoint)
    network: Any = _fused(module)
    spec = _spec(module, module.hparams["size"])

    def whole(folder: Path) -> list[Path]:
        return [_script(network, folder / WHOLE_DETECTOR)]

    boxes = SSDBoxes(network).eval()
    return export_dense(boxes, spec, directory, BOXES, formats, run, more=whole)


def _load(kind: type[Any], checkpoint: str | Path) -> tuple[LightningModule, TrainingState]:
    path = Path(checkpoint).expanduser()
    contents = read_checkpoint(path)
    try:
        module = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError, KeyError, ValueError, ArgumentError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of a {kind.__name__}: {error}") from error
    where = contents.get("epoch"), contents.get("global_step")
    return module, TrainingState(*where, checkpoint=path.name)


def _fused(module: LightningModule) -> nn.Module:
    network = module.model
    assert isinstance(network, nn.Module)
    return fuse(network.eval()).requires_grad_(False)


def _spec(module: Any, size: int) -> ExportSpec:
    model = module.hparams["model"]
    return ExportSpec(model, module.class_names, **resolve_config(model, size))


def _script(network: SSD, path: Path) -> Path:
    """Save all of it, and compare the file's detections with the network's.

    Raises:
        ValueError: they differ.
    """
    side = network.transform.fixed_size[0]
    images = [torch.rand(3, side, side), torch.rand(3, side, 2 * side)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", message="RCNN always returns|SSD always returns")
        contents = io.BytesIO()
        torch.jit.save(torch.jit.script(network), contents)
        path.write_bytes(contents.getbuffer())
        found = torch.jit.load(path)(images)[1]
    for one, other in zip(found, network(images), strict=True):
        same = all(torch.allclose(one[k], other[k], 1e-3, 1e-2) for k in ("boxes", "scores"))
        if not (same and torch.equal(one["labels"], other["labels"])):
            raise ValueError(f"{path.name} detects something else than the network")
    return path
