"""Core ML: an ML program that takes an image and names the class.

coremltools is imported by the functions that need it: its import takes seconds.
"""

import shutil
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mobileone.export.preprocess import WithPreprocessing
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.mlprogram import MLProgram, Prediction
from mobileone.export.verify.parity import NotVerifiedError, Runner
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = [
    "Precision",
    "columns",
    "converted",
    "converted_for",
    "feed",
    "operations",
    "runner",
    "runtime",
    "save",
    "spec",
    "write",
]

_USE = "the `coreml` format"

Precision = Literal["float16", "float32"]

INPUT, LABEL, PROBABILITIES = "image", "classLabel", "classLabel_probs"


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    *,
    precision: Precision = "float16",
    target: str = "iOS16",
    **options: Any,
) -> dict[str, Any]:
    """Convert `model` and save the `.mlpackage` folder at `path`.

    One or three channels become an image input (gray or RGB) of the evaluation size, any other
    number a multi-array input. Either way pixel values run from 0 to 255: the normalization is
    inside the model, and so is the softmax.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects; its class names become the labels.
        path: folder to write; must not exist.
        metadata: shown by Xcode, in addition to the spec as JSON.
        precision: of weights and arithmetic.
        target: the first iOS that runs it.
        options: others of `coremltools.convert`.

    Returns:
        Description of the input and the outputs for the manifest.
    """
    with quiet():
        labels = _coremltools().ClassifierConfig(
            list(spec.class_names), predicted_feature_name=LABEL
        )
    network = WithPreprocessing(model, spec)
    options |= {"classifier_config": labels, "target": target}
    with converted(network, spec, path, precision, **options) as mlmodel:
        save(mlmodel, spec, path, metadata)
    return {**_interface(spec, precision), "minimum_deployment_target": target}


def converted(
    network: nn.Module, spec: ExportSpec, path: Path, precision: Precision, **options: Any
) -> AbstractContextManager[Any]:
    """Convert a network of 8-bit images, as `converted_for` does.

    Args:
        network: pixels 0..255 (1, C, H, W) -> tensors; in eval mode, float32, on the CPU.
        spec: size of the images.
        path: where the package will be.
        precision: of weights and arithmetic.
        options: of `coremltools.convert`, for the outputs.
    """
    shape = (1, *spec.input_size)
    with quiet():
        given = _input(_coremltools(), shape)
    return converted_for(network, torch.zeros(shape), given, path, precision, **options)


@contextmanager
def converted_for(
    network: nn.Module,
    example: Tensor,
    given: Any,
    path: Path,
    precision: Precision,
    target: str = "iOS16",
    **options: Any,
) -> Iterator[Any]:
    """Convert a network to an ML program; coremltools' own copy is removed at the end.

    Args:
        network: in eval mode, float32, on the CPU.
        example: an input of the network.
        given: what it is in Core ML, a type of coremltools.
        path: where the package will be.
        precision: of weights and arithmetic.
        target: the first iOS that runs it.
        options: of `coremltools.convert`, for the outputs.

    Returns:
        The model of coremltools, for `save`.
    """
    # In the caller's folder: coremltools' own temporary copies live until the process ends, which
    # is one more model on the disk at every validation.
    package = path.with_name(f"converted-{path.name}")
    with quiet():
        ct = _coremltools()
        yield ct.convert(
            _captured(network, example),
            inputs=[given],
            convert_to="mlprogram",
            compute_precision=ct.precision(precision),
            minimum_deployment_target=ct.target[target],
            skip_model_load=True,
            package_dir=str(package),
            **options,
        )
    shutil.rmtree(package)


def _captured(network: nn.Module, example: Tensor) -> Any:
    """The network as coremltools reads it: by torch.export, by tracing where that refuses it.

    From torch 2.9 an exported program has operations that coremltools knows only after
    `run_decompositions`.
    """
    try:
        program = torch.export.export(network, (example,))
    except Exception:  # of many types: control flow by values, shapes by values, hooks
        return torch.jit.trace(network, example, check_trace=False)
    return program.run_decompositions({})


def save(mlmodel: Any, spec: ExportSpec, path: Path, metadata: Metadata) -> None:
    """Save a model of coremltools with its metadata."""
    mlmodel.author = metadata.author
    mlmodel.license = metadata.license
    mlmodel.short_description = metadata.description or ""
    mlmodel.version = metadata.version or ""
    mlmodel.user_defined_metadata["spec"] = spec.to_json()
    mlmodel.save(str(path))
    # for a profiler of ExecuTorch: a tenth of the file, which the package's own list leaves out
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


def spec(path: Path) -> ExportSpec:
    """The package's own metadata."""
    with quiet():
        described = import_optional("coremltools.models.utils", _USE, "coremltools").load_spec(
            str(path)
        )
    return ExportSpec.from_json(described.description.metadata.userDefined.get("spec", ""))


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The package as a function: 8-bit images (N, C, H, W) -> probabilities (N, classes).

    Core ML's own runtime on macOS, the reference evaluator elsewhere.

    Raises:
        NotVerifiedError: the reference evaluator does not know an operation.
    """
    if sys.platform == "darwin":
        return runtime(path, spec)
    program = MLProgram(path)

    def run(images: Tensor) -> Tensor:
        answer = program.predict(images)
        return answer.probabilities[:, columns(answer, spec)]

    return run


def runtime(path: Path, spec: ExportSpec) -> Runner:
    """The package as a function, run by Core ML itself.

    Raises:
        NotVerifiedError: this machine has no Core ML runtime.
    """
    if sys.platform != "darwin":
        raise NotVerifiedError(f"the Core ML runtime exists on macOS only; this is {sys.platform}")
    with quiet():
        mlmodel = _coremltools().models.MLModel(str(path))

    def run(images: Tensor) -> Tensor:
        rows = []
        for image in images:
            answer = mlmodel.predict({INPUT: feed(image)})[PROBABILITIES]
            rows.append([float(answer[name]) for name in spec.class_names])
        return torch.tensor(rows)

    return run


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the program."""
    return MLProgram(path).operations()


def columns(answer: Prediction, spec: ExportSpec) -> list[int]:
    """Where the program keeps each of the spec's classes.

    Raises:
        ValueError: the labels in the program are not the spec's.
    """
    position = {name: i for i, name in enumerate(answer.classes)}
    if set(position) != set(spec.class_names) or len(answer.classes) != spec.num_classes:
        unknown = sorted(set(position) ^ set(spec.class_names))
        raise ValueError(f"the labels in the program are not the model's classes: {unknown[:5]}")
    return [position[name] for name in spec.class_names]


def _coremltools() -> types.ModuleType:
    return import_optional("coremltools", _USE, "coremltools")


def _input(ct: Any, shape: tuple[int, ...]) -> Any:
    layouts = {1: ct.colorlayout.GRAYSCALE, 3: ct.colorlayout.RGB}
    if shape[1] in layouts:
        return ct.ImageType(name=INPUT, shape=shape, color_layout=layouts[shape[1]])
    return ct.TensorType(name=INPUT, shape=shape)


def feed(image: Tensor) -> Any:
    """One 8-bit image (C, H, W) in the type that the model's input has."""
    if image.shape[0] not in (1, 3):
        return image[None].float().numpy()
    from PIL import Image

    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)  # (H, W) or (H, W, 3)
    return Image.fromarray(pixels.contiguous().numpy())


def _interface(spec: ExportSpec, precision: str) -> dict[str, Any]:
    channels, height, width = spec.input_size
    pixels = {"name": INPUT, "range": [0, 255], "normalized": False}
    if channels in (1, 3):
        color_space = "GRAYSCALE" if channels == 1 else "RGB"
        pixels |= {"type": "image", "color_space": color_space, "height": height, "width": width}
    else:
        pixels |= {"type": "multi_array", "dtype": "float32", "shape": [1, channels, height, width]}
    return {
        "input": pixels,
        "output": {"name": PROBABILITIES, "type": "dictionary", "kind": "probabilities"},
        "label": {"name": LABEL, "type": "string"},
        "compute_precision": precision,
    }
