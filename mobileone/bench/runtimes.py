"""The table of runtimes: a new one is a row here, or in `RUNTIMES` from a module of your own.

```python
from mobileone.bench.runtimes import RUNTIMES, Runtime, shipped

# in my_runtime.py; `mobileone benchmark latency mobileone_s0 --imports '[my_runtime]'`
RUNTIMES["mine"] = Runtime(convert=shipped("onnx"), load=load)
```
"""

import asyncio
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.bench.timing import Run
from mobileone.export.formats import coreml, litert, torchscript
from mobileone.export.formats.pt2_reader import load_program
from mobileone.export.formats.table import FORMATS
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.io.noise import quiet

__all__ = [
    "RUNTIMES",
    "Runtime",
    "check_runtimes",
    "convert_coreml",
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
        reads: The end of the names of an artifact's files that `load` takes; empty: of none.
        pixels: The file takes pixel values 0..255 and returns probabilities.
        speed: Whether its times say anything about a device; where not, it must be named.
    """

    convert: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path, Tensor, int], Run]
    precision: str = "float32"
    devices: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ()
    install: str = ""
    platform: str = ""
    own_memory: bool = True
    reads: str = ""
    pixels: bool = False
    speed: bool = True

    def lack(self) -> str | None:
        """What this machine lacks to run it, with the remedy; None if nothing."""
        if self.platform and sys.platform != self.platform:
            return f"needs {self.platform}; this is {sys.platform}"
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"needs the package {missing[0]!r}: `pip install '{self.install}'`"
        return None


@cache
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


def _save(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write the module, for `eager` and `compile`."""
    torch.save(model, path)


def _eager(path: Path, x: Tensor, threads: int) -> Run:
    """Read the module; the threads are PyTorch's own, set by the caller."""
    model = torch.load(path, weights_only=False).to(x.device)  # our own file, written a moment ago
    return _complete(model, x)


def _complete(model: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    """One inference that returns when its output exists, on whatever device."""
    wait = torch.get_device_module(x.device).synchronize if x.device.type != "cpu" else None

    def run() -> Tensor:
        with torch.inference_mode():
            output = model(x)
        if wait is not None:
            wait()
        return output

    run()
    return run


_number = count()


def _compiled(path: Path, x: Tensor, threads: int) -> Run:
    """Read the module that `_save` wrote, and compile it.

    A network that cannot be compiled as one graph is an error, not split into graphs.
    """
    model = torch.load(path, weights_only=False).to(x.device)  # our own file

    def forward(x: Tensor) -> Tensor:
        return model(x)

    # PyTorch keeps what it compiled by code object, and all conditions under which one may be
    # used are tried at each call: cases that share the code would slow each other down
    code = forward.__code__.replace(co_name=f"forward_{next(_number)}")
    own = types.FunctionType(code, forward.__globals__, closure=forward.__closure__)
    return _complete(torch.compile(own, fullgraph=True, dynamic=False), x)


_PROFILED = 3  # the executor observes the first calls and optimizes after them


def _torchscript(path: Path, x: Tensor, threads: int) -> Run:
    """Read the file of the format, freeze, and run until the executor has optimized."""
    module = torchscript.load(path.with_suffix(".pt")).to(x.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        run = _complete(torch.jit.freeze(module), x)
    for _ in range(_PROFILED):
        run()
    return run


def _onnxruntime(path: Path, x: Tensor, threads: int) -> Run:
    """Open a session with all optimizations of the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # threads that spin after a run would take the processors from the next case
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors: the rest is about the machine
    session = onnxruntime.InferenceSession(
        str(path.with_suffix(".onnx")), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}

    def run() -> Any:
        return session.run(None, feed)[0]

    run()
    return run


def _openvino(path: Path, x: Tensor, threads: int) -> Run:
    """Compile for the shape of `x`, and for latency, in float32."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "ENABLE_CPU_PINNING": False,  # threads are pinned for all cases alike
    }
    core = openvino.Core()
    model = core.read_model(path.with_suffix(".onnx"))
    model.reshape(list(x.shape))
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    run()
    return run


def convert_coreml(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write an ML program in float16 for the shape of `x`, with the suffix `.mlpackage`.

    The artifact's file takes an image and returns a dictionary of classes; making that in Python
    takes longer than some networks, so this one takes and returns arrays.
    """
    with quiet():
        import coremltools as ct
    given = ct.TensorType(name="images", shape=tuple(x.shape))
    returned = [ct.TensorType(name="logits")]
    path = path.with_suffix(".mlpackage")
    with coreml.converted_for(model, x.cpu(), given, path, "float16", outputs=returned) as written:
        written.save(str(path))


def _coreml(path: Path, x: Tensor, threads: int, *, compute_units: str) -> Run:
    """Compile for the compute units, which are the name of a `coremltools.ComputeUnit`.

    Core ML chooses its threads itself. An artifact's file takes an image, and returns a dictionary
    of classes, which its time includes.
    """
    with quiet():
        import coremltools as ct

        units = getattr(ct.ComputeUnit, compute_units)
        model = ct.models.MLModel(str(path.with_suffix(".mlpackage")), compute_units=units)
    (given,) = model.get_spec().description.input
    image = given.type.WhichOneof("Type") == "imageType"
    feed = {given.name: coreml.feed(x[0].to(torch.uint8)) if image else x.numpy()}

    def run() -> Any:
        found = model.predict(feed)
        return found[coreml.PROBABILITIES] if coreml.PROBABILITIES in found else found["logits"]

    run()
    return run


def _torch_export(path: Path, x: Tensor, threads: int) -> Run:
    """Read the program; the threads are PyTorch's own, set by the caller."""
    return _complete(load_program(path.with_suffix(".pt2")).module().to(x.device), x)


def _executorch(path: Path, x: Tensor, threads: int) -> Run:
    """Load the method, in a pool of that many threads.

    The runtime has one pool, as large as the machine unless it is replaced, which must not happen
    while a method is used that was loaded before.
    """
    with quiet():
        from executorch.extension.pybindings import _C
        from executorch.runtime import Runtime as Interpreter

        if _C._threadpool_get_thread_count() != threads:
            _C._unsafe_reset_threadpool(threads)
        program = Interpreter.get().load_program(path.with_suffix(".pte"))
        forward, feed = program.load_method("forward"), [x]

    def run() -> Any:
        assert program  # whose memory the method reads
        return forward.execute(feed)[0]

    run()
    return run


def _litert(path: Path, x: Tensor, threads: int) -> Run:
    """Open an interpreter, which uses XNNPACK; its memory may hold other values after a run."""
    with quiet():
        interpreter = litert.interpreter(path.with_suffix(".tflite"), threads)
    given, returned = (
        details[0]["index"]
        for details in (interpreter.get_input_details(), interpreter.get_output_details())
    )
    feed = x.numpy()

    def run() -> Any:
        interpreter.set_tensor(given, feed)
        interpreter.invoke()
        return interpreter.get_tensor(returned)

    run()
    return run


def _coreai(path: Path, x: Tensor, threads: int) -> Run:
    """Open the asset in the interpreter of Apple's package."""
    with quiet():
        from coreai.authoring.asset import AIModelAsset
        from coreai.runtime import NDArray

        loop = asyncio.new_event_loop()
        # entered by hand: it stays open as long as there is something to run
        opened = AIModelAsset.load(path.with_suffix(".aimodel")).executable()
        function = loop.run_until_complete(opened.__aenter__()).load_function("main")
    feed: dict[str, Any] = {"image": NDArray(x.numpy())}
    (name,) = function.desc.output_names

    def run() -> Any:
        assert opened
        found: Any = loop.run_until_complete(function(feed))[name]
        return found.numpy()

    weakref.finalize(run, loop.close)
    run()
    return run


_EXTRA = "mobileone-lightning"
_ONNX = ("onnxruntime", "onnx", "onnxscript")
_ANYWHERE, _CPU_AND_CUDA = ("cpu", "cuda", "mps", "xpu"), ("cpu", "cuda")


def _reading(name: str, load: Callable[[Path, Tensor, int], Run], **more: Any) -> Runtime:
    """A runtime of a format's file, as an artifact holds it."""
    file, output = Path(FORMATS[name].filename), FORMATS[name].output
    return Runtime(shipped(name), load, reads=file.suffix, pixels=output == "probabilities", **more)


def _coreml_on(units: str) -> Runtime:
    return Runtime(
        convert_coreml,
        partial(_coreml, compute_units=units),
        precision="float16",
        packages=("coremltools",),
        install="coremltools",
        platform="darwin",
        reads=".mlpackage",
    )


RUNTIMES = {
    "eager": Runtime(_save, _eager, devices=_ANYWHERE),
    "torchscript": _reading("torchscript", _torchscript, devices=_CPU_AND_CUDA),
    "torch_export": _reading("torch_export", _torch_export, devices=_CPU_AND_CUDA),
    "compile": Runtime(_save, _compiled, devices=("cpu", "cuda", "xpu"), own_memory=False),
    "onnxruntime": _reading("onnx", _onnxruntime, packages=_ONNX, install=f"{_EXTRA}[onnx]"),
    "openvino": _reading(
        "onnx", _openvino, packages=("openvino", *_ONNX), install=f"{_EXTRA}[openvino,onnx]"
    ),
    "executorch": _reading(
        "executorch", _executorch, packages=("executorch",), install=f"{_EXTRA}[executorch]"
    ),
    "litert": _reading(
        "litert", _litert, packages=("ai_edge_litert", "litert_torch"), install=f"{_EXTRA}[litert]"
    ),
    "coreai": _reading(
        "coreai", _coreai, packages=("coreai_torch",), install=f"{_EXTRA}[coreai]", speed=False
    ),
    # one row for each choice of compute units, so that they can contend with each other
    "coreml": _coreml_on("ALL"),
    "coreml_cpu": _coreml_on("CPU_ONLY"),
    "coreml_gpu": _coreml_on("CPU_AND_GPU"),
    "coreml_ane": _coreml_on("CPU_AND_NE"),
}
"""The runtime of each name."""


def runtimes_for(device: str) -> tuple[str, ...]:
    """The runtimes that are present, run on a device of PyTorch, and whose times mean something."""
    return tuple(
        name
        for name, runtime in RUNTIMES.items()
        if runtime.speed and runtime.lack() is None and device.partition(":")[0] in runtime.devices
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
