"""What the formats that take normalised tensors say of their input and output."""

from typing import Any

from mobileone.export.spec import ExportSpec

__all__ = ["tensor_interface"]


def tensor_interface(spec: ExportSpec) -> dict[str, Any]:
    """Normalised float images (N, C, H, W) in, logits (N, classes) out; N is free."""
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
