"""TorchScript: a traced module that maps normalised images to logits."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.metadata import Metadata
from mobileone.export.preprocess import normalise
from mobileone.export.spec import ExportSpec

__all__ = ["load", "predict", "write"]


def write(model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata) -> dict[str, Any]:
    """Trace `model` and save it to `path`; the batch size stays free.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects.
        path: file to write.
        metadata: not stored: TorchScript has no field for it; the manifest keeps it.

    Returns:
        Description of the input and the output for the manifest.
    """
    example = torch.zeros(2, *spec.input_size)
    with warnings.catch_warnings():
        _ignore_deprecation()
        traced = torch.jit.trace(model, example, check_trace=False)
        torch.jit.save(traced, path)
    return {
        "input": {
            "type": "tensor",
            "dtype": "float32",
            "shape": ["N", *spec.input_size],
            "layout": "NCHW",
            "normalised": True,
        },
        "output": {
            "type": "tensor",
            "dtype": "float32",
            "shape": ["N", spec.num_classes],
            "kind": "logits",
        },
    }


def load(path: Path) -> nn.Module:
    """Load what `write` saved, on the CPU, in eval mode."""
    with warnings.catch_warnings():
        _ignore_deprecation()
        return torch.jit.load(path, map_location="cpu").eval()


def predict(path: Path, spec: ExportSpec, images: Tensor) -> Tensor:
    """Logits (N, classes) of the file for 8-bit images (N, C, H, W)."""
    with torch.no_grad():
        return load(path)(normalise(images, spec))


def _ignore_deprecation() -> None:
    # PyTorch points at torch.export; the TorchScript file is for runtimes that read only this.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
