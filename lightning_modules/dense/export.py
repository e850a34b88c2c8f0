"""Export of a trained segmentation or detection network, fused completely."""

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_modules.data.transforms import resolve_config
from lightning_modules.dense.models import Detector, Segmenter
from mobileone.dense import fuse
from mobileone.dense.detection import SSDBoxes
from mobileone.dense.export import BOXES, LOGITS, box_formats, map_formats
from mobileone.export import ExportSpec, Manifest, Metadata, TrainingState, export_model
from mobileone.export.checkpoint import read_checkpoint
from mobileone.export.formats.table import DEFAULT_FORMATS
from mobileone.io.plain_arguments import registered_name

__all__ = ["export_detector", "export_segmenter"]


def export_segmenter(
    checkpoint: str | Path,
    directory: str | Path,
    input_size: int = 512,
    formats: Sequence[str] = DEFAULT_FORMATS,
) -> Manifest:
    """Write a segmentation checkpoint's fused network, compared with it, and a manifest.

    Core ML takes one RGB image, the other formats take normalized images (N, 3, H, W); all
    return logits (N, classes, H, W).

    Args:
        checkpoint: written by `mobileone segment fit`.
        directory: the folder to make.
        input_size: side of the images in pixels, a multiple of 32.
        formats: of torchscript, torch_export, onnx and coreml.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the folder is not empty.
        RejectedError: a file computes something else than the network.
        ValueError: the side or a format cannot be used.
    """
    if input_size < 32 or input_size % 32:
        raise ValueError(f"input_size={input_size} must be a multiple of 32.")
    module, run = _load(Segmenter, checkpoint)
    network = fuse(module.model.eval())
    outputs = {LOGITS: (len(module.class_names), input_size, input_size)}
    spec = _spec(module, input_size)
    return _export(network, spec, run, directory, formats, outputs=outputs, table=map_formats())


def export_detector(
    checkpoint: str | Path, directory: str | Path, formats: Sequence[str] = DEFAULT_FORMATS
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
        RejectedError: a file computes something else than the network.
        ValueError: a format cannot be used.
    """
    module, run = _load(Detector, checkpoint)
    network: Any = fuse(module.model.eval()).requires_grad_(False)
    boxes = SSDBoxes(network).eval()
    anchors = len(boxes.centers)
    values = [(anchors, 4), (anchors, len(module.class_names))]
    outputs, table = dict(zip(BOXES, values, strict=True)), box_formats(network)
    spec, chosen = _spec(module, module.hparams["size"]), [*formats, "detector"]
    return _export(boxes, spec, run, directory, chosen, outputs=outputs, table=table)


def _spec(module: Any, size: int) -> ExportSpec:
    model = module.hparams["model"]
    return ExportSpec(model, module.class_names, **resolve_config(model, size))


def _export(
    network: nn.Module,
    spec: ExportSpec,
    run: TrainingState,
    directory: str | Path,
    formats: Sequence[str],
    **dense: Any,
) -> Manifest:
    named = f"{spec.model_name}, {spec.num_classes} classes, reparameterized"
    about = Metadata(description=named)
    # maps and boxes are many values: two images are enough
    return export_model(network, spec, directory, formats, run, about, synthetic=2, **dense)


def _load(kind: type[Any], checkpoint: str | Path) -> tuple[Any, TrainingState]:
    path = Path(checkpoint).expanduser()
    contents = read_checkpoint(path)
    try:
        module: LightningModule = kind.load_from_checkpoint(
            path, map_location="cpu", weights_only=True, **_fetching_nothing(contents)
        )
    except (RuntimeError, TypeError, KeyError, ValueError, ArgumentError) as error:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of a {kind.__name__}: {error}"
        ) from error
    where = contents.get("epoch"), contents.get("global_step")
    return module, TrainingState(*where, checkpoint=path.name)


def _fetching_nothing(contents: dict[str, Any]) -> dict[str, Any]:
    """In place of what the checkpoint says: it brings its weights, and an address is no name."""
    known = dict(contents.get("hyper_parameters", {}))
    return {"pretrained": False, **{k: registered_name(known[k]) for k in ("model",) if k in known}}
