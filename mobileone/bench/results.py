"""A measurement as a file: its rows, with protocol, machine, versions and date."""

import csv
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mobileone.io.atomic import atomic_write, replace_text
from mobileone.io.processor import processor
from mobileone.io.versions import installed_versions

__all__ = ["Result", "Row", "compare_machines"]

Row = dict[str, Any]
"""One line of a table: a string, number, bool or None by column name."""


@dataclass(frozen=True)
class Kind:
    """What a result can be of, and what of it is shown.

    Attributes:
        keys: The columns that name a row. In a chart the first is the panel, the second a bar's
            name, and a third its color.
        columns: Of the printed table, next to `keys`; the files and the report have all.
        bars: Columns that the chart draws, side by side, "" for the statistic; none: no such chart.
        statistic: The number to compare; empty: the protocol names it.
    """

    keys: tuple[str, ...]
    columns: tuple[str, ...]
    bars: tuple[str, ...] = ()
    statistic: str = ""


_TIMES = ("min_ms", "median_ms", "p90_ms", "mean_ms")
_COUNTS = ("parameters_train", "parameters", "macs", "activations", "traffic_bytes")
_TO_PAPER = ("paper_params_m", "params_difference", "paper_mmacs", "macs_difference")

KINDS = {
    "profile": Kind(("model", "level", "name"), (*_COUNTS, *_TO_PAPER), statistic="macs"),
    "latency": Kind(("model", "runtime"), (*_TIMES, "precision")),
    "artifact": Kind(
        ("folder", "file", "runtime"), (*_TIMES, "bytes", "relative_error", "speed"), bars=("",)
    ),
    "throughput": Kind(
        ("model", "runtime", "device", "batch_size"),
        ("images_per_s", "best_images_per_s", "median_ms"),
        statistic="images_per_s",
    ),
    "memory": Kind(
        ("model", "runtime", "batch_size"),
        ("weights_mib", "peak_mib", "running_mib", "tensors_mib"),
        statistic="peak_mib",
    ),
    "training": Kind(
        ("model", "contender"),
        ("seconds", "spread_seconds", "to_plain", "timm_to", "cpu_seconds", "kept_mib", "peak_mib"),
        bars=("seconds", "kept_mib"),
        statistic="seconds",
    ),
    "suite": Kind(
        ("model", "batch_size", "precision", "layout", "contender"),
        ("seconds", "spread_seconds", "to_plain", "timm_to", "kept_mib", "peak_mib"),
        statistic="seconds",
    ),
    "data": Kind(
        ("reader", "workers"),
        ("images_per_s", "slowest_images_per_s", "fastest_images_per_s"),
        statistic="images_per_s",
    ),
    "bottlenecks": Kind(
        ("paper_table", "name", "runtime"),
        ("min_ms", "ratio", "median_ms", "ratio_median", "paper_ms", "paper_ratio"),
        bars=("ratio", "paper_ratio"),
    ),
    "correlation": Kind(("source", "device", "quantity"), ("rho", "p", "n"), statistic="rho"),
    "ablation": Kind(
        ("part", "setting"),
        ("n", "acc1_mean", "acc1_std", "loss_mean", "train_loss_mean", "seconds_mean", "paper_top1",
         "paper_model"),
        bars=("acc1_mean", "paper_top1"),
        statistic="acc1_mean",
    ),
    "quantization": Kind(
        ("model", "setting", "runtime"),
        ("n", "acc1_mean", "acc1_std", "agreement_mean", "megabytes", "refused", "latency_ms",
         "float_latency_ms"),
        bars=("acc1_mean",),
        statistic="acc1_mean",
    ),
}  # fmt: skip

_FORMAT = "mobileone-result-1"
_DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-]\d\d:\d\d)")


@dataclass(frozen=True)
class Result:
    """A table of measurements, and everything needed to judge them.

    Attributes:
        kind: What was measured, one of `KINDS`.
        protocol: How: runs, statistics, threads, sizes …, as JSON holds them.
        machine: Where, as `describe_machine` gives it.
        versions: Versions of the software, as `installed_versions` gives them, and of CUDA.
        date: When, ISO 8601 with the offset of the zone.
        rows: The table. Missing values are None or absent, never NaN.
    """

    kind: str
    protocol: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    rows: list[Row]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` (={self.kind!r}) must be one of {', '.join(KINDS)}")
        for row in self.rows:
            for column, value in row.items():
                if not (value is None or isinstance(value, str | int | float | bool)):
                    raise ValueError(
                        f"`rows`: {column!r} is {type(value).__name__}; "
                        "values must be strings, numbers, bools or None"
                    )

    @classmethod
    def new(
        cls,
        kind: str,
        protocol: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        device: str = "cpu",
    ) -> "Result":
        """A result of this machine, these versions and now.

        Args:
            kind: One of `KINDS`.
            protocol: How it was measured.
            rows: What was measured.
            device: Device of PyTorch that was measured.

        Raises:
            ValueError: `kind` is unknown, or a row holds what JSON cannot.
        """
        return cls(
            kind,
            dict(protocol),
            describe_machine(device),
            _versions(device),
            datetime.now().astimezone().isoformat(timespec="seconds"),
            [dict(row) for row in rows],
        )

    @property
    def machine_id(self) -> str:
        """Hash of the machine; results of different ones must not be compared."""
        return str(self.machine["machine_id"])

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically; the folder is made if it is missing.

        Raises:
            ValueError: A number is NaN or infinite.
        """
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=2, allow_nan=False)
        replace_text(Path(path), text + "\n")
        return Path(path)

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns that name a row."""
        return KINDS[self.kind].keys

    @property
    def statistic(self) -> str:
        """The column to quote and to compare."""
        return KINDS[self.kind].statistic or str(self.protocol.get("statistic", "min_ms"))

    def save_all(self, folder: str | Path) -> list[Path]:
        """Write `<kind>.json` and `<kind>.csv` into a folder, which is made if it is missing.

        Raises:
            ValueError: A number is NaN or infinite.
        """
        stem = Path(folder) / self.kind
        return [self.save(stem.with_suffix(".json")), self.write_csv(stem.with_suffix(".csv"))]

    @classmethod
    def load(cls, path: str | Path, kind: str | None = None) -> "Result":
        """Read what `save` wrote.

        Args:
            path: The JSON file.
            kind: What it must be of; None: anything.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a result, or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path` (={str(path)!r}) is not a file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # also text that is not UTF-8
            raise ValueError(f"{path} is not JSON, so not a result: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f'{path} is not a result: it lacks `"format": "{_FORMAT}"`')
        try:
            result = cls(**content)
            if "machine_id" not in result.machine:
                raise ValueError("its `machine` has no `machine_id`")
            if not _DATE.fullmatch(result.date):
                rule = "must be ISO 8601 with the offset of the zone"
                raise ValueError(f"its `date` (={result.date!r}) {rule}")
            datetime.fromisoformat(result.date)  # that there is such a day
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a complete result: {error}") from error
        if kind is not None and result.kind != kind:
            raise ValueError(f"{path} is a result of {result.kind!r}, not of {kind!r}")
        return result

    def write_csv(self, path: str | Path) -> Path:
        """Write the rows as CSV; the last columns of each repeat where and how it was taken."""
        origin = {
            "date": self.date,
            "machine_id": self.machine_id,
            "machine": json.dumps(self.machine),
            "versions": json.dumps(self.versions),
            "protocol": json.dumps(self.protocol),
        }
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        with (
            atomic_write(Path(path)) as partial,
            partial.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, [*columns, *origin], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | origin for row in self.rows)
        return Path(path)


def compare_machines(results: Sequence[Result]) -> str:
    """Make sure that results are of one machine.

    Returns:
        Its `machine_id`.

    Raises:
        ValueError: There are none, or they are of different machines; lists how they differ.
    """
    if not results:
        raise ValueError("`results` is empty: nothing to compare")
    first = results[0]
    for other in results[1:]:
        if other.machine_id != first.machine_id:
            raise ValueError(
                "timings of different machines must not be compared: "
                f"{_place(first)} and {_place(other)}; measure again on one of them"
            )
    return first.machine_id


def _place(result: Result) -> str:
    cpu, cores, memory, system = map(result.machine.get, ("cpu", "cores", "memory_gib", "os"))
    return f"{result.machine_id} ({cpu}, {cores} cores, {memory} GiB, {system}; {result.date})"


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


def _versions(device: str) -> dict[str, str]:
    versions = installed_versions()
    if device.startswith("cuda"):
        import torch

        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


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
