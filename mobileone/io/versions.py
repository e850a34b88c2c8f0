"""The versions of what files and measurements depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_versions"]

_PACKAGES = (
    *("mobileone-lightning", "torch", "torchvision", "timm", "lightning", "numpy", "fvcore"),
    *("coremltools", "onnx", "onnxruntime", "openvino", "executorch"),
    *("litert-torch", "ai-edge-litert", "coreai-torch", "coreai-core"),
)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
