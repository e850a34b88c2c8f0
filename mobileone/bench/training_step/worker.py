"""A network that trains in a process of its own, one step at each request; its time and memory."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mobileone.bench.training_step.implementations import (
    ImageKind,
    build_implementation,
    sample_images,
)
from mobileone.io.allocator import keep_freed_memory

__all__ = [
    "Precision",
    "StepTime",
    "StepWorker",
    "StepWorkerError",
    "TrainingSetting",
    "kept_bytes",
    "peak_bytes",
    "training_step",
]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, every storage counted once.

    Parameters and buffers exist anyway and do not count.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors themselves: a freed address may be used again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in owned)
    del output
    return total


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that are alive at a time in a step, beyond those alive before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


_MIB = 2.0**20
_WARMUP = 2  # steps in which compilers run and libraries set themselves up
_LIMIT = 1800.0  # seconds for a reply
_PATIENCE = 10.0  # seconds until a process that does not end is killed
# the profiler, which measures memory, logs every start and missing GPUs
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}


Precision = Literal["default", "float32", "tf32", "bfloat16", "float16"]
"""`default`: PyTorch's own, with TF32 in CUDA's convolutions; `float32`: without; `tf32`: in matrix
products as well; the others: the forward pass under autocast, with a scaled loss in float16."""


@dataclass(frozen=True)
class TrainingSetting:
    """What all implementations of a measurement have in common.

    Attributes:
        batch_size: Images in a step.
        image_size: Height and width in pixels.
        threads: CPU threads of PyTorch.
        device: Device of PyTorch.
        channels_last: Memory format of models and images.
        precision: Of the arithmetic, see `Precision`.
        images: What is trained on: crops of photographs, or noise.
    """

    batch_size: int = 16
    image_size: int = 224
    threads: int = 1
    device: str = "cpu"
    channels_last: bool = False
    precision: Precision = "default"
    images: ImageKind = "photos"


@dataclass(frozen=True)
class StepTime:
    """How long a step took.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of all threads of the process together. Threads that wait for each other may
            count, what other processes take does not.
    """

    seconds: float
    cpu_seconds: float


class StepWorkerError(RuntimeError):
    """An implementation could not be trained; the message has the reason."""


class StepWorker:
    """An implementation in a process of its own: neither its end nor its state touches the others.

    Args:
        model: timm's name of the model.
        implementation: Which implementation, a name in `IMPLEMENTATIONS` of `implementations.py`.
        setting: How it is trained.

    Attributes:
        limit: Seconds to wait for a reply: compilers take minutes, a hung process forever.
    """

    def __init__(self, model: str, implementation: str, setting: TrainingSetting) -> None:
        self.limit = _LIMIT
        self._task = model, implementation, setting
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,))
        with _environment(_QUIET):
            self._process.start()
        theirs.close()

    def prepare(self, *task: Any) -> None:
        """Build the network and take the first steps, in which compilers run.

        Args:
            task: Another model, implementation and setting, in place of what the process has.

        Raises:
            StepWorkerError: It failed, as in every method.
        """
        self._ask("prepare", *(task or self._task))

    def step(self) -> StepTime:
        """Take a step: forward, backward, SGD."""
        taken: StepTime = self._ask("step")
        return taken

    def memory(self) -> dict[str, float]:
        """Measure the memory of a step, for an image.

        Returns:
            `kept_mib`, what autograd keeps for the backward pass, every storage once; `peak_mib`,
            most tensors alive at a time, beyond those alive between steps.
        """
        needed: dict[str, float] = self._ask("memory")
        return needed

    def close(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()  # one that waits for orders ends by itself, and tidies up
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()

    def _ask(self, command: str, *arguments: Any) -> Any:
        try:
            self._connection.send((command, *arguments))
            if not self._connection.poll(self.limit):
                self._process.kill()
                raise StepWorkerError(f"no answer to {command!r} in {self.limit:.4g} seconds")
            failure, answer = self._connection.recv()
        except (EOFError, OSError) as error:  # OSError: a broken pipe
            self._process.join()
            raise StepWorkerError(_ending(self._process.exitcode)) from error
        if failure is not None:
            raise StepWorkerError(failure)
        return answer


def training_step(
    model: nn.Module, x: Tensor, precision: Precision = "default"
) -> Callable[[], None]:
    """A complete step on images (N, C, H, W): forward, cross-entropy, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(x.device.type, enabled=precision == "float16")
    targets = torch.arange(len(x), device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(x, precision):
            loss = F.cross_entropy(model(x), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


class _Training:
    """What happens in the process."""

    def __init__(self, model: str, implementation: str, setting: TrainingSetting) -> None:
        keep_freed_memory()  # as `fit` does
        torch.set_num_threads(setting.threads)
        form = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.setting = setting
        self.model = build_implementation(
            implementation, model, setting.device, setting.channels_last
        )
        images = _images(setting.images, setting.batch_size, setting.image_size)
        self.x = images.to(setting.device, memory_format=form)
        if setting.precision != "default":
            allowed = setting.precision != "float32"
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        self._in_graphs = implementation.endswith((" graphs", " reduce-overhead"))
        if implementation.endswith(" graphs"):
            self.model = _graphed(self.model, self.x, setting.precision)
        self._step = training_step(self.model, self.x, setting.precision)
        for _ in range(_WARMUP):
            self._step()

    def step(self) -> StepTime:
        self._synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        self._step()
        self._synchronize()
        return StepTime(time.perf_counter() - started, time.process_time() - cpu_started)

    def memory(self) -> dict[str, float]:
        if self._in_graphs and self.x.is_cuda:  # whose memory is never given back
            return {}
        peak = peak_bytes(self._step, self.setting.device)
        with _autocast(self.x, self.setting.precision):
            kept = kept_bytes(self.model, self.x)
        share = _MIB * len(self.x)
        return {"kept_mib": kept / share, "peak_mib": peak / share}

    def _synchronize(self) -> None:
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)


_images = lru_cache(maxsize=1)(sample_images)  # a second for hundreds


def _graphed(model: nn.Module, x: Tensor, precision: Precision) -> nn.Module:
    """The network with forward and backward passes as CUDA graphs."""
    if not x.is_cuda:
        raise ValueError("CUDA graphs need a CUDA device")
    with _autocast(x, precision, cache=False):
        graphed: Any = torch.cuda.make_graphed_callables(model, (x,))
    return cast(nn.Module, graphed)


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    training: _Training | None = None
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if command == "prepare":
                training = None  # free its memory first
                torch.cuda.empty_cache()
                training, answer = _Training(*arguments), None
            else:
                answer = getattr(training, command)()
        except Exception as error:  # whatever a compiler raises: the others are measured still
            first = next(iter(str(error).splitlines()), "")
            connection.send((f"{type(error).__name__}: {first}"[:200], None))
        else:
            connection.send((None, answer))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that a process which is started meanwhile has, unless they are set already."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _autocast(x: Tensor, precision: Precision, cache: bool = True) -> AbstractContextManager[Any]:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    enabled = dtype is not None
    return torch.autocast(x.device.type, dtype, enabled=enabled, cache_enabled=cache)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"
