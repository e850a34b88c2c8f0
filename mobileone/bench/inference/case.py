"""A fused network in a runtime: folded, converted, and shown to compute the same."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from mobileone.bench.results import Row
from mobileone.bench.runtimes import RUNTIMES
from mobileone.bench.suites import input_size_of
from mobileone.bench.timing import Run, check_device, check_threads
from mobileone.export.verify.structure import unfused_layers
from mobileone.reparameterize import reparameterize

__all__ = [
    "TOLERANCE",
    "BenchmarkCase",
    "Setting",
    "as_tensor",
    "build_form",
    "prepare",
    "relative_error",
]

_FOLDING_TOLERANCE = 1e-3
"""Of float32 outputs, relative to the largest: folding changes the order of sums only."""


_SETTLING = 4  # images that BatchNorm's statistics are of


def build_form(
    model: nn.Module, image_size: int | None, batch_size: int = 1
) -> tuple[nn.Module, Row, Tensor]:
    """Fold a network with BatchNorm statistics of random images, the same in every call.

    With the initial statistics activations of an untrained MobileOne grow beyond 1e8, and other
    networks' shrink to denormal numbers, which processors multiply slowly.

    Args:
        model: Is put in eval mode; its statistics are changed.
        image_size: Height and width; None: what the model is meant for.
        batch_size: How many images to return.

    Returns:
        What `deploy_form` does, and other random images, (N, C, H, W).

    Raises:
        RuntimeError: As `deploy_form`.
    """
    size = input_size_of(model, image_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        update_bn([torch.randn(_SETTLING, *size)], model)
        x = torch.randn(batch_size, *size)
    return *deploy_form(model.eval(), x[:1]), x


@torch.no_grad()
def deploy_form(model: nn.Module, x: Tensor) -> tuple[nn.Module, Row]:
    """Fold a network and verify the fold on an input.

    Every network gets what converters for phones do anyway: BatchNorm inside the convolution. So
    those that ship without it have no advantage where the runtime (eager PyTorch) folds nothing.

    Args:
        model: In eval mode, with BatchNorm statistics that are not the initial ones, or the
            check means little.
        x: (N, C, H, W), on the same device.

    Returns:
        A copy in inference form, and how much is left unfolded: `branches_left`, layers that have a
        folded form but are not in it (none is expected), and `norms_left`, BatchNorms that no
        convolution directly precedes.

    Raises:
        RuntimeError: The folded branches do not compute what the network computes.
    """
    expected = model(x)
    fused = reparameterize(model)
    error = relative_error(fused(x), expected)
    if not error < _FOLDING_TOLERANCE:
        raise RuntimeError(f"folding the branches changed the output by {error:.2g} (relative)")
    branches = len(list(unfused_layers(fused)))
    before = deepcopy(fused)  # in case that a pair is not what it seems
    for conv_name, norm_name in _pairs(fused, x):
        _fold(fused, conv_name, norm_name)
    if not relative_error(fused(x), expected) < _FOLDING_TOLERANCE:
        fused = before  # the output of some convolution is read by another operation as well
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    return fused, {"branches_left": branches, "norms_left": norms}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.double().cpu().abs().max())


def _pairs(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorms that read their output as it is."""
    made: dict[int, tuple[str, Tensor, int]] = {}  # the tensors too: a freed id is used again
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    hooks = []

    def after_conv(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            made[id(output)] = (name, output, output._version)

        hooks.append(model.get_submodule(name).register_forward_hook(hook))

    def before_norm(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            conv, tensor, version = made.get(id(inputs[0]), ("", inputs[0], -1))
            if tensor._version == version:  # nothing changed it in place in between
                pairs.append((conv, name))

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))

    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            after_conv(name)
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d):
            before_norm(name)
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    norm = model.get_submodule(norm_name)
    assert isinstance(norm, nn.BatchNorm2d)
    conv = fuse_conv_bn_eval(model.get_submodule(conv_name), norm)  # type: ignore[type-var]
    rest: nn.Module = nn.Identity()
    if isinstance(norm, BatchNormAct2d):
        rest = nn.Sequential(norm.drop, norm.act).eval()
    model.set_submodule(conv_name, conv)
    model.set_submodule(norm_name, rest)


_Files = dict[Callable[[nn.Module, Tensor, Path], None], Path]  # what each has written

TOLERANCE = {"float32": 1e-3, "float16": 5e-2}  # as for artifacts: the order of sums; 11 bits


@dataclass(frozen=True)
class Setting:
    """What all cases of a measurement have in common.

    Attributes:
        threads: Threads of the runtime.
        batch_size: Images in an inference.
        image_size: Height and width; None: what each model is meant for.
        device: Device of PyTorch.

    Raises:
        ValueError: One is out of its range, or there is no such device.
    """

    threads: int = 1
    batch_size: int = 1
    image_size: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.image_size is not None and self.image_size < 1):
            raise ValueError(
                f"`batch_size` (={self.batch_size}) and `input_size` (={self.image_size}) must be "
                "at least 1"
            )
        check_device(self.device)
        check_threads(self.threads)


@dataclass(frozen=True)
class BenchmarkCase:
    """A network in a runtime.

    Attributes:
        row: What a result reports about it before it is measured; `failure` is the reason why it
            cannot be, or None.
        model: The fused network, on the CPU.
        x: Its input, (N, C, H, W), on the device.
        path: What the runtime's `convert` wrote.
        load: Makes it ready to run, again each time; None where it failed.
    """

    row: Row
    model: nn.Module
    x: Tensor
    path: Path
    load: Callable[[], Run] | None


def prepare(
    name: str,
    build: Callable[[], nn.Module],
    runtimes: Sequence[str],
    folder: Path,
    setting: Setting,
) -> list[BenchmarkCase]:
    """A network in each of several runtimes.

    Args:
        name: What the rows call it.
        build: Makes it, in eval mode.
        runtimes: Names in `RUNTIMES`.
        folder: Where the files go; is made.
        setting: The rest.
    """
    folder.mkdir()
    model, left, x = build_form(build(), setting.image_size, setting.batch_size)
    with torch.inference_mode():
        expected = model(x)
    row: Row = {"model": name, "runtime": "", **asdict(setting), "image_size": x.shape[2], **left}
    files: _Files = {}
    return [
        _in_runtime(row | {"runtime": runtime}, model, x, expected, folder, files)
        for runtime in runtimes
    ]


def _in_runtime(
    row: Row, model: nn.Module, x: Tensor, expected: Tensor, folder: Path, files: _Files
) -> BenchmarkCase:
    runtime = RUNTIMES[row["runtime"]]
    path = files.get(runtime.convert, folder / row["runtime"])
    row = row | {"precision": runtime.precision, "failure": None}
    placed = x.to(row["device"])
    if runtime.pixels:  # the file divides by 255, and ends with a softmax
        placed, expected = 255 * placed, expected.softmax(dim=1)
    started = time.perf_counter()

    checked: list[Run] = []  # is used first: compiling it a second time may take a minute

    def load() -> Run:
        return checked.pop() if checked else runtime.load(path, placed, row["threads"])

    try:
        if runtime.convert not in files:
            runtime.convert(model, x, path)
            files[runtime.convert] = path
        run = load()
        error = relative_error(as_tensor(run()), expected)
        if not error < TOLERANCE[runtime.precision]:
            raise RuntimeError(f"its output differs from PyTorch's by {error:.2g} (relative)")
    except Exception as failure:  # whatever a converter raises: the others are measured still
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        return BenchmarkCase(row | {"failure": reason}, model, placed, path, None)
    checked.append(run)
    row |= {"relative_error": error, "prepare_s": time.perf_counter() - started}
    return BenchmarkCase(row, model, placed, path, load)


def as_tensor(output: Any) -> Tensor:
    """What a runtime returned, as a tensor of its own."""
    return output.clone() if isinstance(output, Tensor) else torch.as_tensor(output).clone()
