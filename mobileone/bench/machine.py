"""What a measurement ran on: the machine, its device, the versions of the software."""

import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "describe_versions", "processor"]

_PACKAGES = (
    "mobileone-lightning",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "fvcore",
    "lightning",
    "onnx",
    "onnxruntime",
    "openvino",
    "coremltools",
)


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Describe this machine, and a device of it.

    Args:
        device: Device of PyTorch that was measured, such as "cpu", "cuda:0" or "mps".

    Returns:
        `cpu` (model name), `cores` (logical), `cores_usable` (by this process), `memory_gib`,
        `os`, `device`, `device_name`, and `machine_id`: a hash of processor, cores, memory and
        operating system, which neither a reboot nor an update changes. Two machines that agree
        in all of these count as one.
    """
    cores = os.cpu_count()
    machine: dict[str, Any] = {
        "cpu": processor(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "os": f"{platform.system()} {platform.machine()}",
    }
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return machine | {
        "cores_usable": len(affinity(0)) if affinity else cores,
        "os_release": platform.release(),
        "device": device,
        "device_name": _device_name(device),
        "machine_id": digest,
    }


def describe_versions(device: str = "cpu") -> dict[str, str]:
    """Versions of Python and of the installed packages that measurements depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        import torch

        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


@cache
def processor() -> str:
    """Model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError):  # Windows has no sysconf
        return None


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return processor()
    import torch

    return torch.cuda.get_device_name(device)
