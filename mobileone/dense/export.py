"""The formats of networks that return maps or boxes: rows for the one export pipeline.

Core ML takes an RGB image and returns tensors. A detector becomes a pipeline of the network and
Core ML's own non-maximum suppression, which is what Vision recognizes: its request then returns
`VNRecognizedObjectObservation`s.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert

from mobileone.export.formats import coreml, torchscript
from mobileone.export.formats.table import (
    FLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    Format,
    tensor_formats,
)
from mobileone.export.preprocess import FromPixels
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.parity import Parity, Reference, compare_outputs
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = [
    "BOXES",
    "LOGITS",
    "Suppression",
    "box_formats",
    "map_formats",
    "write_boxes",
]

LOGITS = "logits"
BOXES = ("boxes", "scores")
CONFIDENCE, COORDINATES = "confidence", "coordinates"
_RAW = ("raw_confidence", "raw_coordinates")  # what the suppression gets, as in Apple's detectors
_PIXELS = {"name": coreml.INPUT, "type": "image", "color_space": "RGB", "range": [0, 255]}


class Suppression(NamedTuple):
    """What Core ML's suppression does unless the app sets other values.

    Attributes:
        iou: Of two boxes of one class that overlap more than this, the better one stays.
        confidence: Boxes below it are left out.
    """

    iou: float = 0.45
    confidence: float = 0.25


def map_formats() -> dict[str, Format]:
    """The rows of networks that return logits (N, classes, H, W)."""
    return {
        **tensor_formats([LOGITS]),
        "coreml": _coreml_format(_write_map, _map),
    }


def box_formats(network: SSD | None = None) -> dict[str, Format]:
    """The rows of networks that return the boxes of all anchors and their probabilities.

    Args:
        network: The fused detector for `detector`, a file of everything, from a list of images
            (3, H, W) in 0..1 to boxes in pixels after suppression; None leaves the row out.
    """
    rows = {
        **tensor_formats(BOXES),
        "coreml": _coreml_format(write_boxes, _boxes),
    }
    if network is not None:
        rows["detector"] = Format(
            "detector.torchscript.pt",
            partial(_write_detector, network),
            _detector_runner,
            check=partial(_check_detector, network),
        )
    return rows


# -- Core ML ----------------------------------------------------------------------------------


def _coreml_format(write: Callable[..., Any], run: Callable[[MLProgram, Tensor], Any]) -> Format:
    def runner(path: Path, spec: ExportSpec) -> Callable[[Tensor], Any]:
        return partial(run, MLProgram(path))

    file, operations = "model.mlpackage", coreml.operations
    return Format(file, write, runner, FLOAT16_TOLERANCE, operations=operations)


class _Candidates(FromPixels):
    """Pixels 0..255 (1, 3, H, W) -> confidence (A, classes without background), coordinates."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = super().forward(image)
        corners = boxes[0].unflatten(1, (2, 2))  # (A, 4) -> (A, corner, x or y)
        sides = corners[:, 1] - corners[:, 0]
        return scores[0, :, 1:], torch.cat([corners.mean(dim=1), sides], dim=1)


def _write_map(
    network: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save the `.mlpackage` of a network: images (1, 3, H, W) -> logits (1, classes, H, W)."""
    with _converted(FromPixels(network, spec), spec, path, [LOGITS]) as model:
        coreml.save(model, spec, path, metadata)
    return {"input": _PIXELS, "output": {"names": [LOGITS]}}


def write_boxes(
    network: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    *,
    precision: coreml.Precision = "float16",
) -> dict[str, Any]:
    """Convert a detector, join it with a suppression, and save the `.mlpackage` folder.

    The package takes an RGB `image` and, if the app wants others, `iouThreshold` and
    `confidenceThreshold`; it returns `confidence` (B, classes without background) and
    `coordinates` (B, 4): x and y of the center, width and height, as parts of the image's sides.

    Args:
        network: fused, in eval mode, float32, on the CPU; normalized images (1, 3, H, W) -> boxes
            (1, A, 4) as corners in 0..1 and probabilities (1, A, classes), background first.
        spec: size, normalization and names of the classes, background first.
        path: folder to write; must not exist.
        metadata: shown by Xcode.
        precision: of weights and arithmetic.
    """
    with _converted(_Candidates(network, spec), spec, path, _RAW, precision) as model:
        ct = import_optional("coremltools", "Core ML", "coremltools")
        following = _suppression(ct, model.get_spec(), spec)
        pipeline = ct.utils.make_pipeline(model, ct.models.MLModel(following))
        coreml.save(pipeline, spec, path, metadata)
    return {"input": _PIXELS, "output": {"names": list(BOXES)}}


def _converted(
    network: nn.Module,
    spec: ExportSpec,
    path: Path,
    names: list[str] | tuple[str, ...],
    precision: coreml.Precision = "float16",
) -> Any:
    with quiet():
        ct = import_optional("coremltools", "Core ML", "coremltools")
    outputs = [ct.TensorType(name=name, dtype=np.float32) for name in names]
    return coreml.converted(network, spec, path, precision, outputs=outputs)


def _suppression(ct: Any, network: Any, spec: ExportSpec) -> Any:
    """The model that follows the network: its inputs are the network's outputs."""
    model = ct.proto.Model_pb2.Model()
    model.specificationVersion = network.specificationVersion
    nms = model.nonMaximumSuppression
    nms.confidenceInputFeatureName, nms.coordinatesInputFeatureName = _RAW
    nms.confidenceOutputFeatureName, nms.coordinatesOutputFeatureName = CONFIDENCE, COORDINATES
    nms.iouThresholdInputFeatureName = "iouThreshold"
    nms.confidenceThresholdInputFeatureName = "confidenceThreshold"
    nms.iouThreshold, nms.confidenceThreshold = Suppression()
    nms.pickTop.perClass = True
    nms.stringClassLabels.vector.extend(spec.class_names[1:])
    columns = {CONFIDENCE: spec.num_classes - 1, COORDINATES: 4}
    for output in network.description.output:
        model.description.input.add().CopyFrom(output)
    for name, meaning in (
        ("iouThreshold", "overlap above which the lesser box of a class is left out"),
        ("confidenceThreshold", "boxes below it are left out"),
    ):
        given = model.description.input.add()
        given.name = name
        given.shortDescription = f"{meaning}; {getattr(nms, name):g} if not given"
        given.type.isOptional = True
        given.type.doubleType.SetInParent()
    for name, width in columns.items():
        returned = model.description.output.add()
        returned.name = name
        array = returned.type.multiArrayType
        array.dataType = ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
        for low, high in ((0, -1), (width, width)):  # any number of boxes
            size = array.shapeRange.sizeRanges.add()
            size.lowerBound, size.upperBound = low, high
    return model


# -- A package read back, and run without Core ML ------------------------------------------------


def _map(program: MLProgram, images: Tensor) -> Tensor:
    """8-bit images (N, 3, H, W) -> logits (N, classes, H, W)."""
    return program.outputs(images, [LOGITS])[0].flatten(0, 1)


def _boxes(program: MLProgram, images: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (N, A, 4) as corners, and probabilities (N, A, classes) with the background's."""
    confidence, coordinates = program.outputs(images, _RAW)
    background = 1 - confidence.sum(dim=-1, keepdim=True)
    corners = box_convert(coordinates, "cxcywh", "xyxy")
    return corners, torch.cat([background, confidence], dim=-1)


# -- The complete detector, in TorchScript ---------------------------------------------------------


def _write_detector(
    network: SSD, boxes: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    contents = io.BytesIO()
    with _torchscript_is_deprecated():
        torch.jit.save(torch.jit.script(network), contents)
    path.write_bytes(contents.getbuffer())
    return {
        "input": {"type": "list of images (3, H, W) in 0..1"},
        "output": {"type": "a dictionary an image", "names": ["boxes", "scores", "labels"]},
    }


def _detector_runner(path: Path, spec: ExportSpec) -> Callable[[Any], tuple[Tensor, ...]]:
    """8-bit images (3, H, W) -> boxes, scores and labels of all their detections."""
    with _torchscript_is_deprecated():
        module = torch.jit.load(path)

    def run(images: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
        with _torchscript_is_deprecated():
            return _joined(module([image / 255 for image in images])[1])

    return run


def _check_detector(
    network: SSD, path: Path, spec: ExportSpec, reference: Reference
) -> dict[str, Parity]:
    """Compare detections; an image of another shape than the training's is among them."""
    first, second = reference.images[:2]
    images = [first, torch.cat([first, second], dim=-1)]
    expected = _joined(network([image / 255 for image in images]))
    found = _detector_runner(path, spec)(images)
    if not len(expected[0][0]) and not len(found[0][0]):
        return {"parity": Parity("measured", "no detections", images=len(images))}
    named = dict(zip(("boxes", "scores", "labels"), expected, strict=True))
    return {"parity": compare_outputs(named, found, FLOAT32_TOLERANCE)}


def _joined(detections: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    """Boxes (1, B, 4), scores (1, B) and labels (1, B) of all images."""
    keys = ("boxes", "scores", "labels")
    return tuple(torch.cat([image[key] for image in detections])[None] for key in keys)


@contextmanager
def _torchscript_is_deprecated() -> Iterator[None]:
    with torchscript.deprecation_ignored():
        warnings.filterwarnings("ignore", message="RCNN always returns|SSD always returns")
        yield
