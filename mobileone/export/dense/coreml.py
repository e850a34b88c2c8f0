"""Core ML for networks that return maps or boxes: an RGB image in, tensors out.

A detector becomes a pipeline of the network and Core ML's own non-maximum suppression, which is
what Vision recognizes: its request then returns `VNRecognizedObjectObservation`s.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert

from mobileone.export.formats.coreml import Precision
from mobileone.export.preprocess import WithPreprocessing
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.parity import NotVerifiedError
from mobileone.io.coremltools_noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = ["DenseProgram", "Detections", "Suppression", "write_boxes", "write_map"]

INPUT, LOGITS = "image", "logits"
CONFIDENCE, COORDINATES = "confidence", "coordinates"
_RAW = "raw_"  # what the suppression is given, as in Apple's own detectors


class Suppression(NamedTuple):
    """What Core ML's suppression does where the app does not say otherwise.

    Attributes:
        iou: Of two boxes of one class that overlap more than this, the better one stays.
        confidence: Boxes below it are left out.
    """

    iou: float = 0.45
    confidence: float = 0.25


class Detections(NamedTuple):
    """What the pipeline answers: confidence (B, classes) and coordinates (B, 4).

    Coordinates are x and y of the center, width and height, as parts of the image's sides.
    """

    confidence: Tensor
    coordinates: Tensor


class _Logits(WithPreprocessing):
    """Pixels 0..255 (N, 3, H, W) -> logits (N, classes, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


class _Candidates(WithPreprocessing):
    """Pixels 0..255 (1, 3, H, W) -> confidence (A, classes without background), coordinates."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        boxes, scores = self.model((x - self.mean) * self.scale)
        corners = boxes[0].unflatten(1, (2, 2))  # (A, 4) -> (A, corner, x or y)
        sides = corners[:, 1] - corners[:, 0]
        return scores[0, :, 1:], torch.cat([corners.mean(dim=1), sides], dim=1)


def write_map(
    network: nn.Module, spec: ExportSpec, path: Path, *, precision: Precision = "float16"
) -> None:
    """Convert a network of RGB images and save the `.mlpackage` folder at ``path``.

    Args:
        network: fused, in eval mode, float32, on the CPU; normalized images (1, 3, H, W) -> logits
            (1, classes, H, W).
        spec: size and normalization of the images; the latter goes into the file.
        path: folder to write; must not exist.
        precision: of weights and arithmetic.
    """
    converted = path.with_name(
        f"converted-{path.name}"
    )  # coremltools' own copy stays until the end
    with quiet():
        model = _convert(_Logits(network, spec), spec, [LOGITS], converted, precision)
        _save(model, spec, path)
    shutil.rmtree(converted)


def write_boxes(
    network: nn.Module,
    spec: ExportSpec,
    path: Path,
    *,
    suppression: Suppression | None = None,
    precision: Precision = "float16",
) -> None:
    """Convert a detector, join it with a suppression, and save the `.mlpackage` folder.

    The package takes an RGB `image` and, if the app wants others, `iouThreshold` and
    `confidenceThreshold`; it returns `confidence` (B, classes without background) and
    `coordinates` (B, 4), as `Detections` has them.

    Args:
        network: fused, in eval mode, float32, on the CPU; normalized images (1, 3, H, W) -> boxes
            (1, A, 4) as corners in 0..1 and probabilities (1, A, classes), background first.
        spec: size, normalization and names of the classes, background first.
        path: folder to write; must not exist.
        suppression: the thresholds that hold by default.
        precision: of weights and arithmetic.
    """
    converted = path.with_name(f"converted-{path.name}")
    names = [_RAW + CONFIDENCE, _RAW + COORDINATES]
    with quiet():
        ct = import_optional("coremltools", "Core ML", "coremltools")
        model = _convert(_Candidates(network, spec), spec, names, converted, precision)
        chosen = suppression or Suppression()
        last = ct.models.MLModel(_suppression(ct, model.get_spec(), spec, chosen))
        _save(ct.utils.make_pipeline(model, last), spec, path)
    shutil.rmtree(converted)


def _convert(
    network: nn.Module, spec: ExportSpec, names: Sequence[str], package: Path, precision: Precision
) -> Any:
    ct = import_optional("coremltools", "Core ML", "coremltools")
    example = torch.zeros(1, *spec.input_size)
    traced = torch.jit.trace(network, example, check_trace=False)
    return ct.convert(
        traced,
        inputs=[
            ct.ImageType(name=INPUT, shape=tuple(example.shape), color_layout=ct.colorlayout.RGB)
        ],
        outputs=[ct.TensorType(name=name, dtype=np.float32) for name in names],
        convert_to="mlprogram",
        compute_precision=ct.precision(precision),
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
        package_dir=str(package),
    )


def _save(model: Any, spec: ExportSpec, path: Path) -> None:
    model.short_description = f"{spec.model_name}, {spec.num_classes} classes, reparameterized"
    model.user_defined_metadata["spec"] = spec.to_json()
    model.save(str(path))


def _suppression(ct: Any, network: Any, spec: ExportSpec, chosen: Suppression) -> Any:
    """The model that follows the network: its inputs are the network's outputs."""
    model = ct.proto.Model_pb2.Model()
    model.specificationVersion = network.specificationVersion
    nms = model.nonMaximumSuppression
    nms.confidenceInputFeatureName, nms.coordinatesInputFeatureName = (
        _RAW + CONFIDENCE,
        _RAW + COORDINATES,
    )
    nms.confidenceOutputFeatureName, nms.coordinatesOutputFeatureName = CONFIDENCE, COORDINATES
    nms.iouThresholdInputFeatureName = "iouThreshold"
    nms.confidenceThresholdInputFeatureName = "confidenceThreshold"
    nms.iouThreshold, nms.confidenceThreshold = chosen
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


class DenseProgram(MLProgram):
    """A package of `write_map` or `write_boxes` read back, and run without Core ML.

    Args:
        path: the package.

    Raises:
        NotVerifiedError: it holds something that this evaluator does not know.
    """

    def map(self, image: Tensor, *, rounding: bool = True) -> Tensor:
        """One 8-bit image (3, H, W) -> logits (1, classes, H, W).

        Raises:
            NotVerifiedError: an operation, an argument or the output is unknown.
            ValueError: the image is not of the program's size.
        """
        return self._outputs(image, (LOGITS,), rounding)[0]

    def candidates(self, image: Tensor, *, rounding: bool = True) -> Detections:
        """What the suppression is given for one 8-bit image (3, H, W): one row an anchor.

        Raises:
            NotVerifiedError: an operation, an argument or an output is unknown.
            ValueError: the image is not of the program's size.
        """
        return Detections(*self._outputs(image, (_RAW + CONFIDENCE, _RAW + COORDINATES), rounding))

    def detect(self, image: Tensor, chosen: Suppression | None = None) -> Detections:
        """What the pipeline returns for one 8-bit image (3, H, W), best box first.

        A box belongs to the class of its highest confidence, and competes with those of that class
        (`PickTop.perClass` of Core ML's specification).
        """
        confidence, coordinates = self.candidates(image)
        nms = self._suppression
        least = nms.confidenceThreshold if chosen is None else chosen.confidence
        best, labels = confidence.max(dim=1)
        kept = best >= least
        confidence, coordinates = confidence[kept], coordinates[kept]
        corners = box_convert(coordinates, "cxcywh", "xyxy")
        overlap = nms.iouThreshold if chosen is None else chosen.iou
        order = batched_nms(corners, best[kept], labels[kept], overlap)
        return Detections(confidence[order], coordinates[order])

    @torch.no_grad()
    def _outputs(self, image: Tensor, names: Sequence[str], rounding: bool) -> list[Tensor]:
        values: dict[str, Any] = {self._input.name: self._pixels(image)}
        for operation in self._operations:
            self._execute(operation, values, rounding)
        if missing := [name for name in names if name not in values]:
            raise NotVerifiedError(f"a program without the outputs {missing}")
        return [values[name] for name in names]
