"""Core ML: an ML program in half precision that takes an image and names the class.

coremltools is imported by the functions that need it: its import takes seconds.
"""

import contextlib
import io
import logging
import re
import shutil
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.metadata import Metadata
from mobileone.export.parity import NotVerifiedError
from mobileone.export.preprocess import WithPreprocessing
from mobileone.export.spec import ExportSpec

__all__ = ["predict", "write"]

INPUT, LABEL, PROBABILITIES = "image", "classLabel", "classLabel_probs"

# What coremltools says on every machine that has a current PyTorch, or is not a Mac.
_NOISE = re.compile(
    r"scikit-learn version .* is not supported"
    r"|Torch version .* has not been tested with coremltools"
    r"|TensorFlow version .* has not been tested with coremltools"
    r"|Failed to load _ML\w+"
)
_PROGRESS = re.compile(r"(Converting PyTorch Frontend|Running MIL \w+ pipeline)")


def write(model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata) -> dict[str, Any]:
    """Convert `model` and save the `.mlpackage` folder at `path`.

    One or three channels become an image input (gray or RGB) of the evaluation size, any other
    number a multi-array input. Either way pixel values run from 0 to 255: the normalisation is
    inside the model, and so is the softmax.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects; its class names become the labels.
        path: folder to write; must not exist.
        metadata: shown by Xcode.

    Returns:
        Description of the input and the outputs for the manifest.
    """
    shape = (1, *spec.input_size)
    # In the caller's folder: coremltools' own temporary copies live until the process ends, which
    # is one more model on the disk at every validation.
    converted = path.with_name(f"converted-{path.name}")
    with _quiet():
        ct = _coremltools()
        traced = torch.jit.trace(
            WithPreprocessing(model, spec), torch.zeros(shape), check_trace=False
        )
        mlmodel = ct.convert(
            traced,
            inputs=[_input(ct, shape)],
            classifier_config=ct.ClassifierConfig(
                list(spec.class_names), predicted_feature_name=LABEL
            ),
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT16,
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
            package_dir=str(converted),
        )
        mlmodel.author = metadata.author
        mlmodel.license = metadata.license
        mlmodel.short_description = metadata.description or ""
        mlmodel.version = metadata.version or ""
        mlmodel.save(str(path))
    shutil.rmtree(converted)
    return _interface(spec)


def predict(path: Path, spec: ExportSpec, images: Tensor) -> Tensor:
    """Probabilities (N, classes) from Core ML's own runtime for 8-bit images (N, C, H, W).

    Raises:
        NotVerifiedError: this machine has no Core ML runtime.
    """
    if sys.platform != "darwin":
        raise NotVerifiedError(f"the Core ML runtime exists on macOS only; this is {sys.platform}")
    with _quiet():
        mlmodel = _coremltools().models.MLModel(str(path))
    rows = []
    for image in images:
        answer = mlmodel.predict({INPUT: _feed(image)})[PROBABILITIES]
        rows.append([float(answer[name]) for name in spec.class_names])
    return torch.tensor(rows)


def _coremltools() -> types.ModuleType:
    try:
        import coremltools
    except ImportError as error:
        raise ImportError(
            "the `coreml` format needs coremltools: `pip install coremltools`, or leave "
            "`coreml` out of `formats`"
        ) from error
    return coremltools


def _input(ct: Any, shape: tuple[int, ...]) -> Any:
    layouts = {1: ct.colorlayout.GRAYSCALE, 3: ct.colorlayout.RGB}
    if shape[1] in layouts:
        return ct.ImageType(name=INPUT, shape=shape, color_layout=layouts[shape[1]])
    return ct.TensorType(name=INPUT, shape=shape)


def _feed(image: Tensor) -> Any:
    """One 8-bit image (C, H, W) in the type that the model's input has."""
    if image.shape[0] not in (1, 3):
        return image[None].float().numpy()
    from PIL import Image

    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)  # (H, W) or (H, W, 3)
    return Image.fromarray(pixels.contiguous().numpy())


def _interface(spec: ExportSpec) -> dict[str, Any]:
    channels, height, width = spec.input_size
    pixels = {"name": INPUT, "range": [0, 255], "normalised": False}
    if channels in (1, 3):
        color_space = "GRAYSCALE" if channels == 1 else "RGB"
        pixels |= {"type": "image", "color_space": color_space, "height": height, "width": width}
    else:
        pixels |= {"type": "multi_array", "dtype": "float32", "shape": [1, channels, height, width]}
    return {
        "input": pixels,
        "output": {"name": PROBABILITIES, "type": "dictionary", "kind": "probabilities"},
        "label": {"name": LABEL, "type": "string"},
        "compute_precision": "float16",
        "minimum_deployment_target": "iOS16",
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back known noise by its text, and nothing else."""
    logger = logging.getLogger("coremltools")

    def wanted(record: logging.LogRecord) -> bool:
        return not _NOISE.search(record.getMessage())

    captured = io.StringIO()
    logger.addFilter(wanted)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(captured):
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
            warnings.filterwarnings("ignore", message=r"Output, '.*', of the source model, has")
            # coremltools leaves a temporary folder of weights to the garbage collector
            warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
            yield
    finally:
        logger.removeFilter(wanted)
        for line in re.split(r"[\r\n]+", captured.getvalue()):
            if line.strip() and not (_PROGRESS.match(line) or _NOISE.search(line)):
                print(line, file=sys.stderr)
