"""The cost of a training step: our blocks, timm's, and the plain net, side by side."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from mobileone.bench.contenders import CONTENDERS, build_contender
from mobileone.bench.machine import processor
from mobileone.bench.memory import kept_bytes, peak_bytes

__all__ = ["TrainingBenchmark", "TrainingCost", "benchmark_training"]


@dataclass(frozen=True)
class TrainingCost:
    """What one contender needs for a step on one variant.

    Attributes:
        variant: Name of the model.
        contender: Name of the implementation.
        seconds: Median time of a step: forward, backward, SGD.
        spread: Distance of the quartiles of that time, in seconds.
        cpu_seconds: Median CPU time of a step, of all threads: what other processes take does not
            count, but threads that wait for each other do, so that one thread is the fair setting.
        kept: Bytes that autograd keeps for the backward pass, for an image.
        peak: Most bytes of tensors alive at a time beyond the model's own, for an image.
    """

    variant: str
    contender: str
    seconds: float
    spread: float
    cpu_seconds: float
    kept: float
    peak: float


@dataclass(frozen=True)
class TrainingBenchmark:
    """The measurements and where they were taken.

    Attributes:
        costs: A row for every variant and contender.
        batch_size: Images a step.
        image_size: Height and width in pixels.
        rounds: Timed steps of every contender.
        device: Device, with its name.
        threads: CPU threads of PyTorch.
        torch_version: Version of PyTorch.
    """

    costs: tuple[TrainingCost, ...]
    batch_size: int
    image_size: int
    rounds: int
    device: str
    threads: int
    torch_version: str

    def cost(self, variant: str, contender: str) -> TrainingCost:
        """The row of a contender.

        Raises:
            ValueError: It was not measured.
        """
        for row in self.costs:
            if (row.variant, row.contender) == (variant, contender):
                return row
        measured = ", ".join(f"{row.variant} {row.contender}" for row in self.costs)
        raise ValueError(f"{variant} {contender} was not measured; there is {measured}")

    def table(self) -> Table:
        """The rows for a terminal, with times relative to timm's and to the plain net's."""
        title = (
            f"Training step, {self.batch_size} images of {self.image_size} px, {self.device}, "
            f"{self.threads} threads, torch {self.torch_version}"
        )
        table = Table(title=title)
        for heading in ("variant", "contender"):
            table.add_column(heading)
        for heading in (
            "step (s)",
            "× plain",
            "timm ÷",
            "CPU (s)",
            "kept (MiB/image)",
            "peak (MiB/image)",
        ):
            table.add_column(heading, justify="right")
        for row in self.costs:
            table.add_row(
                row.variant,
                row.contender,
                f"{row.seconds:.3f} ± {row.spread / 2:.3f}",
                self._ratio(row.seconds, row.variant, "plain", inverse=False),
                self._ratio(row.seconds, row.variant, "timm", inverse=True),
                f"{row.cpu_seconds:.3f}",
                f"{row.kept / 2**20:.1f}",
                f"{row.peak / 2**20:.1f}",
            )
        return table

    def save(self, directory: str | Path) -> Path:
        """Write `training.json` and the chart `training.png` to a directory, made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / "training.json").write_text(text, encoding="utf-8")
        self._draw(directory / "training.png")
        return directory

    def _ratio(self, seconds: float, variant: str, other: str, inverse: bool) -> str:
        for row in self.costs:
            if (row.variant, row.contender) == (variant, other):
                return f"{row.seconds / seconds if inverse else seconds / row.seconds:.2f}"
        return "–"

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure  # slow to import

        variants = list(dict.fromkeys(row.variant for row in self.costs))
        names = list(dict.fromkeys(row.contender for row in self.costs))
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, 2)
        units = (("seconds", "s a step", 1.0), ("kept", "MiB kept an image", 2.0**20))
        for axes, (field, label, unit) in zip(panels, units, strict=True):
            for i, name in enumerate(names):
                rows = [row for row in self.costs if row.contender == name]
                places = [variants.index(row.variant) + i / (len(names) + 1) for row in rows]
                values = [getattr(row, field) / unit for row in rows]
                axes.bar(places, values, 0.9 / (len(names) + 1), align="edge", label=name)
            middle = 0.5 * len(names) / (len(names) + 1)
            axes.set_xticks([v + middle for v in range(len(variants))], variants)
            axes.set_ylabel(label)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
        figure.suptitle(f"{self.batch_size} × {self.image_size} px, {self.device}")
        figure.savefig(path, dpi=150)


def benchmark_training(
    variants: Sequence[str] = ("mobileone_s0", "mobileone_s1"),
    contenders: Sequence[str] = tuple(CONTENDERS),
    batch_size: int = 16,
    image_size: int = 224,
    rounds: int = 7,
    device: str = "cpu",
    channels_last: bool = False,
    directory: str | Path | None = None,
) -> TrainingBenchmark:
    """Measure training steps of several implementations in one process, in turn.

    Every round runs one step of every contender, so that what else the machine does meets them
    all; the medians are over the rounds. Two steps of each go before, in which compilers run.

    Args:
        variants: Models, by timm's names.
        contenders: Implementations, by their names in `CONTENDERS`.
        batch_size: Images a step.
        image_size: Height and width in pixels.
        rounds: Timed steps of each.
        device: "cpu" or "cuda".
        channels_last: Memory format of models and images; worth it on CUDA only.
        directory: Where to save the table as JSON and a chart as PNG; None: nowhere.

    Returns:
        The measurements.

    Raises:
        ValueError: A name or a number is out of range, or there is no such device.
    """
    if min(batch_size, image_size, rounds) < 1:
        raise ValueError(
            f"`batch_size` (={batch_size}), `image_size` (={image_size}) and `rounds` (={rounds}) "
            "must be at least 1"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`device` (={device!r}): this machine has no CUDA device; use 'cpu'")
    costs: list[TrainingCost] = []
    for variant in variants:
        form = torch.channels_last if channels_last else torch.contiguous_format
        models = {name: build_contender(name, variant, device) for name in contenders}
        x = torch.randn(batch_size, 3, image_size, image_size, device=device)
        x = x.to(memory_format=form)
        steps = {
            name: _training_step(model.to(memory_format=form), x) for name, model in models.items()
        }
        times, cpu_times = _time_in_turn(steps, rounds, device)
        for name, model in models.items():
            costs.append(
                TrainingCost(
                    variant,
                    name,
                    statistics.median(times[name]),
                    _quartile_distance(times[name]),
                    statistics.median(cpu_times[name]),
                    kept_bytes(model, x) / batch_size,
                    peak_bytes(steps[name], device) / batch_size,
                )
            )
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    result = TrainingBenchmark(
        tuple(costs),
        batch_size,
        image_size,
        rounds,
        f"{device} ({name})",
        torch.get_num_threads(),
        str(torch.__version__),
    )
    if directory is not None:
        result.save(directory)
    return result


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    targets = torch.arange(len(x), device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets).backward()
        optimizer.step()

    return step


def _time_in_turn(
    steps: dict[str, Callable[[], None]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + rounds):
        for name, step in steps.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
                cpu_times[name].append(time.process_time() - cpu_started)
    return times, cpu_times


def _quartile_distance(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first
