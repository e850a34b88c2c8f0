"""Results as tables for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mobileone.bench.results import Result, Row, compare_machines

__all__ = ["change_table", "latency_table", "memory_table", "profile_table", "throughput_table"]


@dataclass(frozen=True)
class _Column:
    """A heading, and a row's text under it."""

    heading: str
    text: Callable[[Row], str]
    right: bool = True


def _number(heading: str, key: str, form: str = ".2f", unit: float = 1.0) -> _Column:
    def text(row: Row) -> str:
        value = row.get(key)
        return "–" if value is None else format(value / unit, form)

    return _Column(heading, text)


def _words(heading: str, key: str) -> _Column:
    return _Column(heading, lambda row: str(row.get(key, "")), right=False)


_COUNTS = (
    _number("params (M)", "parameters", ".3f", 1e6),
    _number("MACs (M)", "macs", ".1f", 1e6),
    _number("activations (M)", "activations", ".2f", 1e6),
    _number("traffic (MiB)", "traffic_bytes", ".1f", 2.0**20),
)
_TIMES = (
    _number("min (ms)", "min_ms"),
    _number("median", "median_ms"),
    _number("p90", "p90_ms"),
    _number("mean", "mean_ms"),
)


def profile_table(result: Result, level: str = "model") -> Table:
    """What networks, their stages or their layers have and do.

    Args:
        result: Of the kind `profile`.
        level: `model`, `stage` or `layer`.

    Raises:
        ValueError: `level` is unknown.
    """
    if level not in ("model", "stage", "layer"):
        raise ValueError(f"`level` (={level!r}) must be one of model, stage, layer")
    train = _number("trained (M)", "parameters_train", ".3f", 1e6)
    columns = {
        "model": (
            _words("model", "model"), train, *_COUNTS,
            _number("paper: params", "paper_params_m", "g"),
            _number("%", "params_difference", "+.1f"),
            _number("paper: MACs", "paper_mmacs", "g"),
            _number("%", "macs_difference", "+.1f"),
        ),
        "stage": (_words("model", "model"), _words("stage", "name"), train, *_COUNTS),
        "layer": (_words("model", "model"), _words("layer", "name"), *_COUNTS),
    }[level]  # fmt: skip
    rows = [row for row in result.rows if row["level"] == level]
    table = _table("One image, fused, BatchNorm folded; MACs by fvcore", columns, rows)
    notes = [
        f"{row['model']}: not in the MACs: {row['uncounted']}"
        for row in result.rows
        if row.get("uncounted")
    ]
    table.caption = "\n".join([*notes, *_left(result)]) or None
    table.caption_justify = "left"
    return table


def latency_table(result: Result) -> Table:
    """Times of each network in each runtime, the one to quote first, fastest first."""
    rows = sorted(result.rows, key=lambda row: row.get(result.protocol["statistic"]) or 1e9)
    columns = (_words("model", "model"), _words("runtime", "runtime"), *_TIMES,
               _words("precision", "precision"))  # fmt: skip
    return _timed(result, columns, rows, f"quote {_quoted(result)}")


def throughput_table(result: Result) -> Table:
    """Images a second of each network, by runtime, device and batch size."""
    columns = (
        _words("model", "model"), _words("runtime", "runtime"), _words("device", "device"),
        _number("batch", "batch_size", "g"), _number("images/s", "images_per_s", ".1f"),
        _number("best", "best_images_per_s", ".1f"), _number("median (ms)", "median_ms"),
    )  # fmt: skip
    return _timed(result, columns, result.rows, "images/s from the median")


def memory_table(result: Result) -> Table:
    """Peak memory of each network, by runtime and batch size."""
    columns = (
        _words("model", "model"), _words("runtime", "runtime"),
        _number("batch", "batch_size", "g"), _number("weights (MiB)", "weights_mib", ".1f"),
        _number("peak", "peak_mib", ".1f"), _number("running", "running_mib", ".1f"),
        _number("tensors", "tensors_mib", ".1f"),
    )  # fmt: skip
    return _timed(result, columns, result.rows, "growth of a fresh process")


def change_table(before: Result, after: Result) -> Table:
    """Two latency results of one machine side by side.

    Raises:
        ValueError: They are of different machines or protocols, or have no contender in common.
    """
    compare_machines([before, after])
    settings = ("statistic", "threads", "batch_size", "image_size", "device")
    for key in settings:
        first, second = before.protocol.get(key), after.protocol.get(key)
        if first != second:
            raise ValueError(f"`{key}` is {first!r} in one result and {second!r} in the other")
    statistic = after.protocol["statistic"]
    old = {(row["model"], row["runtime"]): row.get(statistic) for row in before.rows}
    rows = []
    for row in after.rows:
        earlier, now = old.get((row["model"], row["runtime"])), row.get(statistic)
        if earlier and now:
            rows.append(row | {"before": earlier, "ratio": now / earlier})
    if not rows:
        raise ValueError("the two results have no contender in common")
    columns = (
        _words("model", "model"), _words("runtime", "runtime"),
        _number(f"before ({before.date[:16]})", "before"), _number("now", statistic),
        _number("now / before", "ratio", ".3f"),
    )  # fmt: skip
    return _table(f"{_quoted(after)}, ms", columns, rows)


def _timed(result: Result, columns: Sequence[_Column], rows: Sequence[Row], what: str) -> Table:
    protocol, machine = result.protocol, result.machine
    title = (
        f"{result.kind.capitalize()}, {what}; {protocol['threads']} of {machine['cores']} threads, "
        f"{machine['device_name']} ({machine['device']}), torch {result.versions['torch']}, "
        f"{result.date[:16]}"
    )
    table = _table(title, columns, [row for row in rows if row["failure"] is None])
    notes = [
        f"{row['model']} in {row['runtime']}: {row['failure']}" for row in rows if row["failure"]
    ]
    missing: Mapping[str, Any] = protocol.get("runtimes_missing", {})
    notes += [f"runtime {name!r} {lack}" for name, lack in missing.items()]
    notes += [
        f"{name}: neither timm nor torchvision has it" for name in protocol.get("missing", [])
    ]
    table.caption = "\n".join([*notes, *_left(result)]) or None
    table.caption_justify = "left"
    return table


def _left(result: Result) -> list[str]:
    left = {
        row["model"]: f"{row['model']}: not folded: {row['branches_left']} layers, "
        f"{row['norms_left']} BatchNorms"
        for row in result.rows
        if row.get("branches_left") or row.get("norms_left")
    }
    return list(left.values())


def _quoted(result: Result) -> str:
    protocol = result.protocol
    word = protocol["statistic"].removesuffix("_ms")
    return f"the {word} of {protocol['runs']} (protocol {protocol['name']!r})"


def _table(title: str, columns: Sequence[_Column], rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(
            column.heading, justify="right" if column.right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(column.text(row) for column in columns))
    return table
