"""The table of runtimes: a new one is a row here, or in `RUNTIMES` from a module of your own.

```python
from mobileone.bench.runtimes import RUNTIMES, Runtime, shipped

# in my_runtime.py; `mobileone benchmark latency mobileone_s0 --imports '[my_runtime]'`
RUNTIMES["mine"] = Runtime(convert=shipped("onnx"), load=load)
```
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.bench.inference.timing import Run
from mobileone.bench.runtimes import compiled, coreml, eager, onnxruntime, openvino, torchscript
from mobileone.export.formats.table import FORMATS
from mobileone.export.spec import ExportSpec, Metadata

__all__ = [
    "RUNTIMES",
    "Runtime",
    "check_runtimes",
    "missing_runtimes",
    "runtimes_for",
    "shipped",
]


@dataclass(frozen=True)
class Runtime:
    """How a fused network becomes a file, and the file something that runs.

    Attributes:
        convert: Writes the model (float32, eval, CPU), for inputs of the shape of the tensor,
            to a path without suffix, to which it may add one. Not timed. Runtimes with the same
            `convert` share what it wrote.
        load: Makes ready what `convert` wrote, to run on a tensor (on its device) with a number
            of threads: compiled, and run once. Not timed. What it returns gives the logits when
            called, in whatever type the runtime has.
        precision: Of the arithmetic.
        devices: Types of device that it runs on.
        packages: What must be importable.
        install: What to hand to `pip install` where a package is missing.
        platform: `sys.platform` that it needs; empty: any.
        own_memory: Whether the memory of a process that loads the file is the runtime's own;
            not where a compiler runs in it.
    """

    convert: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path, Tensor, int], Run]
    precision: str = "float32"
    devices: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ()
    install: str = ""
    platform: str = ""
    own_memory: bool = True

    def lack(self) -> str | None:
        """What this machine lacks to run it, with the remedy; None if nothing."""
        if self.platform and sys.platform != self.platform:
            return f"needs {self.platform}; this is {sys.platform}"
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"needs the package {missing[0]!r}: `pip install '{self.install}'`"
        return None


def shipped(name: str) -> Callable[[nn.Module, Tensor, Path], None]:
    """A `convert` that writes the file of a format, as an artifact holds it.

    Args:
        name: A row of `mobileone.export.FORMATS`; the path gets the suffix of its file.
    """

    def convert(model: nn.Module, x: Tensor, path: Path) -> None:
        channels, height, width = x.shape[1:]
        with torch.inference_mode():
            classes = tuple(map(str, range(model(x[:1].cpu()).shape[1])))
        size = (channels, height, width)
        spec = ExportSpec(
            "network", classes, size, (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0
        )
        file = path.with_suffix(Path(FORMATS[name].filename).suffix)
        FORMATS[name].write(model, spec, file, Metadata())

    return convert


_TORCHSCRIPT, _ONNX = shipped("torchscript"), shipped("onnx")
_ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
_ANYWHERE = ("cpu", "cuda", "mps", "xpu")


def _coreml(units: str) -> Runtime:
    return Runtime(
        coreml.convert,
        partial(coreml.load, compute_units=units),
        precision="float16",
        packages=("coremltools",),
        install="coremltools",
        platform="darwin",
    )


RUNTIMES = {
    "eager": Runtime(eager.convert, eager.load, devices=_ANYWHERE),
    "torchscript": Runtime(_TORCHSCRIPT, torchscript.load, devices=("cpu", "cuda")),
    "compile": Runtime(
        eager.convert, compiled.load, devices=("cpu", "cuda", "xpu"), own_memory=False
    ),
    "onnxruntime": Runtime(
        _ONNX,
        onnxruntime.load,
        packages=_ONNX_PACKAGES,
        install="mobileone-lightning[onnx]",
    ),
    "openvino": Runtime(
        _ONNX,
        openvino.load,
        packages=("openvino", *_ONNX_PACKAGES),
        install="mobileone-lightning[openvino,onnx]",
    ),
    # one row for each choice of compute units, so that they can contend with each other
    "coreml": _coreml("ALL"),
    "coreml_cpu": _coreml("CPU_ONLY"),
    "coreml_gpu": _coreml("CPU_AND_GPU"),
    "coreml_ane": _coreml("CPU_AND_NE"),
}
"""What each name stands for."""


def runtimes_for(device: str) -> tuple[str, ...]:
    """The runtimes that are present and run on a device of PyTorch."""
    return tuple(
        name
        for name, runtime in RUNTIMES.items()
        if runtime.lack() is None and device.partition(":")[0] in runtime.devices
    )


def missing_runtimes() -> dict[str, str]:
    """The runtimes that are not present, and what each lacks."""
    lacks = {name: runtime.lack() for name, runtime in RUNTIMES.items()}
    return {name: lack for name, lack in lacks.items() if lack is not None}


def check_runtimes(names: Iterable[str] | None, device: str) -> tuple[str, ...]:
    """The names as a tuple without repeats; None: all that are present.

    Raises:
        ValueError: One is unknown, or does not run on the device.
        ImportError: One lacks a package or the platform; names the remedy.
    """
    if names is None:
        return runtimes_for(device)
    if isinstance(names, str):
        raise ValueError(f"`runtimes` (={names!r}) must be a list of names, e.g. [{names!r}]")
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in RUNTIMES:
            raise ValueError(f"`runtimes`: unknown {name!r}; choose from {', '.join(RUNTIMES)}")
        lack = RUNTIMES[name].lack()
        if lack is not None:
            raise ImportError(f"the runtime {name!r} {lack}")
        if device.partition(":")[0] not in RUNTIMES[name].devices:
            fit = ", ".join(runtimes_for(device)) or "none"
            raise ValueError(f"`runtimes`: {name!r} does not run on {device!r}; these do: {fit}")
    if not chosen:
        raise ValueError(f"`runtimes` is empty: choose from {', '.join(RUNTIMES)}")
    return chosen
