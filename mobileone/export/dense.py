"""Core ML for networks that return a map: an image in, one logit a class and pixel out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileone.export.coreml import Precision
from mobileone.export.extras import need
from mobileone.export.mlprogram import MLProgram
from mobileone.export.parity import NotVerifiedError
from mobileone.export.preprocess import WithPreprocessing
from mobileone.export.quiet import quiet
from mobileone.export.spec import ExportSpec

__all__ = ["MapProgram", "write_map"]

INPUT, OUTPUT = "image", "logits"


class _FromPixels(WithPreprocessing):
    """Pixels 0..255 (N, 3, H, W) -> logits (N, classes, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def write_map(
    network: nn.Module, spec: ExportSpec, path: Path, *, precision: Precision = "float16"
) -> None:
    """Convert a network of RGB images and save the `.mlpackage` folder at ``path``.

    Args:
        network: fused, in eval mode, float32, on the CPU; normalised images (1, 3, H, W) -> logits
            (1, classes, H, W).
        spec: size and normalisation of the images; the latter goes into the file.
        path: folder to write; must not exist.
        precision: of weights and arithmetic.
    """
    example = torch.zeros(1, *spec.input_size)
    shape = tuple(example.shape)
    beside = path.with_name(f"converted-{path.name}")  # coremltools' own copy stays until the end
    finished = path.with_name(f"finished-{path.name}")
    with quiet():
        ct = need("coremltools", "Core ML", "coremltools")
        traced = torch.jit.trace(_FromPixels(network, spec), example, check_trace=False)
        model = ct.convert(
            traced,
            inputs=[ct.ImageType(name=INPUT, shape=shape, color_layout=ct.colorlayout.RGB)],
            outputs=[ct.TensorType(name=OUTPUT)],
            convert_to="mlprogram",
            compute_precision=ct.precision(precision),
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
            package_dir=str(beside),
        )
        model.save(str(finished))
    shutil.rmtree(beside)
    finished.rename(path)


class MapProgram(MLProgram):
    """A package of `write_map` read back, and run without Core ML.

    Args:
        path: the package.

    Raises:
        NotVerifiedError: it holds something that this evaluator does not know.
    """

    @torch.no_grad()
    def run(self, image: Tensor, *, rounding: bool = True) -> Tensor:
        """One 8-bit image (3, H, W) -> logits (1, classes, H, W).

        Raises:
            NotVerifiedError: an operation or an argument is unknown.
            ValueError: the image is not of the program's size.
        """
        values: dict[str, Any] = {self._input.name: self._pixels(image)}
        for operation in self._operations:
            if operation.type not in _KERNELS:
                self._execute(operation, values, rounding)
                continue
            given = {name: _resolve(given, values) for name, given in operation.arguments.items()}
            ((name, kind),) = operation.outputs
            value = _KERNELS[operation.type](**given)
            values[name] = value.half().float() if rounding and kind == "FLOAT16" else value
        if OUTPUT not in values:
            raise NotVerifiedError(f"a program without the output {OUTPUT!r}")
        answer: Tensor = values[OUTPUT]
        return answer


def _resolve(argument: Any, values: dict[str, Any]) -> Any:
    """The value of a name, of each name in a list, or what is a value already."""
    if isinstance(argument, list):
        return [_resolve(part, values) for part in argument]
    return values.get(argument, argument) if isinstance(argument, str) else argument


def _concat(values: list[Tensor], axis: int, interleave: bool) -> Tensor:
    if interleave:
        raise NotVerifiedError("`concat` that interleaves")
    return torch.cat(values, axis)


def _bilinear(
    x: Tensor, scale_factor_height: float, scale_factor_width: float, align_corners: bool
) -> Tensor:
    size = [round(x.shape[-2] * scale_factor_height), round(x.shape[-1] * scale_factor_width)]
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def _nearest(x: Tensor, scale_factor_height: float, scale_factor_width: float) -> Tensor:
    size = [round(x.shape[-2] * scale_factor_height), round(x.shape[-1] * scale_factor_width)]
    return F.interpolate(x, size, mode="nearest")


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "concat": _concat,
    "upsample_bilinear": _bilinear,
    "upsample_nearest_neighbor": _nearest,
}
