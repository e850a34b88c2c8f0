"""A network that trains in a process of its own, one step at each request; its time and memory."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

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
_LIMIT = 1800.0  # seconds for a reply: compilers take minutes, a hung process forever
_PATIENCE = 10.0  # seconds until a process that does not end is killed
# the profiler, which measures memory, logs every start and missing GPUs
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}


@dataclass(frozen=True)
class TrainingSetting:
    """What all implementations of a measurement have in common.

    Attributes:
        batch_size: Images in a step.
        image_size: Height and width in pixels.
        threads: CPU threads of PyTorch.
        device: Device of PyTorch.
        channels_last: Memory format of models and images.
        amp: Whether the forward pass runs under autocast in bfloat16.
        images: What is trained on: crops of photographs, or noise.
    """

    batch_size: int = 16
    image_size: int = 224
    threads: int = 1
    device: str = "cpu"
    channels_last: bool = False
    amp: bool = False
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
    """

    def __init__(self, model: str, implementation: str, setting: TrainingSetting) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, model, implementation, setting))
        with _environment(_QUIET):
            self._process.start()
        theirs.close()

    def prepare(self) -> None:
        """Build the network and take the first steps, in which compilers run.

        Raises:
            StepWorkerError: It failed, as in every method.
        """
        self._ask("prepare")

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

    def _ask(self, command: str) -> Any:
        try:
            self._connection.send(command)
            if not self._connection.poll(_LIMIT):
                self._process.kill()
                raise StepWorkerError(f"no answer to {command!r} in {_LIMIT:g} seconds")
            failure, answer = self._connection.recv()
        except (EOFError, OSError) as error:  # OSError: a broken pipe
            self._process.join()
            raise StepWorkerError(_ending(self._process.exitcode)) from error
        if failure is not None:
            raise StepWorkerError(failure)
        return answer


def training_step(model: nn.Module, x: Tensor, amp: bool = False) -> Callable[[], None]:
    """A complete step on images (N, C, H, W): forward, cross-entropy, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    targets = torch.arange(len(x), device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(x, amp):
            loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()

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
        images = sample_images(setting.images, setting.batch_size, setting.image_size)
        self.x = images.to(setting.device, memory_format=form)
        self._step = training_step(self.model, self.x, setting.amp)
        for _ in range(_WARMUP):
            self._step()

    def step(self) -> StepTime:
        self._synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        self._step()
        self._synchronize()
        return StepTime(time.perf_counter() - started, time.process_time() - cpu_started)

    def memory(self) -> dict[str, float]:
        peak = peak_bytes(self._step, self.setting.device)
        with _autocast(self.x, self.setting.amp):
            kept = kept_bytes(self.model, self.x)
        share = _MIB * len(self.x)
        return {"kept_mib": kept / share, "peak_mib": peak / share}

    def _synchronize(self) -> None:
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)


def _serve(
    connection: Connection, model: str, implementation: str, setting: TrainingSetting
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    training: _Training | None = None
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        try:
            training = training or _Training(model, implementation, setting)
            answer = None if command == "prepare" else getattr(training, command)()
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


def _autocast(x: Tensor, amp: bool) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=amp)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"
