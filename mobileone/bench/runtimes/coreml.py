"""Core ML on macOS: an ML program in float16, on selectable compute units.

The artifact's file takes an image and returns a dictionary of classes; making that in Python takes
longer than some networks, so this one takes and returns arrays.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.bench.inference.timing import Run
from mobileone.io.coremltools_noise import quiet

__all__ = ["convert", "load"]


def convert(model: nn.Module, x: Tensor, path: Path) -> None:
    """Convert for the shape of `x`; writes the package `path`, with the suffix `.mlpackage`."""
    with quiet():
        import coremltools as ct

        traced = torch.jit.trace(model, x.cpu(), check_trace=False)
        converted = ct.convert(
            traced,
            inputs=[ct.TensorType(name="images", shape=tuple(x.shape))],
            outputs=[ct.TensorType(name="logits")],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        )
        converted.save(str(path.with_suffix(".mlpackage")))


def load(path: Path, x: Tensor, threads: int, *, compute_units: str) -> Run:
    """Compile for the compute units, which are the name of a `coremltools.ComputeUnit`.

    Core ML chooses its threads itself.
    """
    with quiet():
        import coremltools as ct

        units = getattr(ct.ComputeUnit, compute_units)
        model = ct.models.MLModel(str(path.with_suffix(".mlpackage")), compute_units=units)
    feed = {"images": x.numpy()}

    def run() -> Any:
        return model.predict(feed)["logits"]

    run()
    return run
