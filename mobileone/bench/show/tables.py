"""Results as tables for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from mobileone.bench.results import Result, Row, compare_machines

__all__ = [
    "Column",
    "change_table",
    "latency_table",
    "make_table",
    "memory_table",
    "number",
    "profile_table",
    "throughput_table",
    "words",
]


@dataclass(frozen=True)
class Column:
    """A heading, and a row's text under it."""

    heading: str
    text: Callable[[Row], str]
    right: bool = True


def number(heading: str, key: str, form: str = ".2f", unit: float = 1.0) -> Column:
    """A column of numbers, in a unit; a dash where a row has none."""

    def text(row: Row) -> str:
        value = row.get(key)
        return "–" if value is None else format(value / unit, form)

    return Column(heading, text)


def words(heading: str, key: str) -> Column:
    """A column of texts."""
    return Column(heading, lambda row: str(row.get(key, "")), right=False)


def make_table(
    title: str, columns: Sequence[Column], rows: Sequence[Row], notes: Sequence[str] = ()
) -> Table:
    """A table for a terminal, with notes below, a line each."""
    below = escape("\n".join(notes)) or None  # not markup: a package's [extra] has brackets, too
    table = Table(title=escape(title), caption=below, caption_justify="left")
    for column in columns:
        table.add_column(
            column.heading, justify="right" if column.right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(column.text(row)) for column in columns))
    return table


_COUNTS = (
    number("params (M)", "parameters", ".3f", 1e6),
    number("MACs (M)", "macs", ".1f", 1e6),
    number("activations (M)", "activations", ".2f", 1e6),
    number("traffic (MiB)", "traffic_bytes", ".1f", 2.0**20),
)
_TIMES = (
    number("min (ms)", "min_ms"),
    number("median", "median_ms"),
    number("p90", "p90_ms"),
    number("mean", "mean_ms"),
)


# what must agree where two results are compared; a protocol has some of these
_SETTINGS = (
    *("statistic", "threads", "batch_size", "image_size", "device", "images", "amp"),
    *("channels_last", "model", "config", "epochs", "options"),
)


def profile_table(result: Result) -> Table:
    """What networks, their stages or their layers have and do, by the protocol's `shown`."""
    train = number("trained (M)", "parameters_train", ".3f", 1e6)
    level = result.protocol.get("shown", "model")
    columns = {
        "model": (
            words("model", "model"), train, *_COUNTS,
            number("paper: params", "paper_params_m", "g"),
            number("%", "params_difference", "+.1f"),
            number("paper: MACs", "paper_mmacs", "g"),
            number("%", "macs_difference", "+.1f"),
        ),
        "stage": (words("model", "model"), words("stage", "name"), train, *_COUNTS),
        "layer": (words("model", "model"), words("layer", "name"), *_COUNTS),
    }[level]  # fmt: skip
    rows = [row for row in result.rows if row["level"] == level]
    notes = [
        f"{row['model']}: not in the MACs: {row['uncounted']}"
        for row in result.rows
        if row.get("uncounted")
    ]
    title = "One image, fused, BatchNorm folded; MACs by fvcore"
    return make_table(title, columns, rows, [*notes, *_left(result)])


def latency_table(result: Result) -> Table:
    """Times of each network in each runtime, the one to quote first, fastest first."""
    rows = sorted(result.rows, key=lambda row: row.get(result.statistic) or 1e9)
    columns = (words("model", "model"), words("runtime", "runtime"), *_TIMES,
               words("precision", "precision"))  # fmt: skip
    return _timed(result, columns, rows, f"quote {_quoted(result)}")


def throughput_table(result: Result) -> Table:
    """Images a second of each network, by runtime, device and batch size."""
    columns = (
        words("model", "model"), words("runtime", "runtime"), words("device", "device"),
        number("batch", "batch_size", "g"), number("images/s", "images_per_s", ".1f"),
        number("best", "best_images_per_s", ".1f"), number("median (ms)", "median_ms"),
    )  # fmt: skip
    return _timed(result, columns, result.rows, "images/s from the median")


def memory_table(result: Result) -> Table:
    """Peak memory of each network, by runtime and batch size."""
    columns = (
        words("model", "model"), words("runtime", "runtime"),
        number("batch", "batch_size", "g"), number("weights (MiB)", "weights_mib", ".1f"),
        number("peak", "peak_mib", ".1f"), number("running", "running_mib", ".1f"),
        number("tensors", "tensors_mib", ".1f"),
    )  # fmt: skip
    return _timed(result, columns, result.rows, "growth of a fresh process")


def change_table(before: Result, after: Result) -> Table:
    """Two results of one kind and one machine side by side, by the number that is to be compared.

    Raises:
        ValueError: They are of different kinds, machines or settings, or have no row in common.
    """
    compare_machines([before, after])
    for key in _SETTINGS:
        first, second = before.protocol.get(key), after.protocol.get(key)
        if first != second:
            raise ValueError(f"`{key}` is {first!r} in one result and {second!r} in the other")
    statistic = after.statistic
    old = {tuple(row.get(key) for key in after.keys): row.get(statistic) for row in before.rows}
    rows = []
    for row in after.rows:
        earlier, now = old.get(tuple(row.get(key) for key in after.keys)), row.get(statistic)
        if earlier and now:
            rows.append(row | {"before": earlier, "ratio": now / earlier})
    if not rows:
        raise ValueError("the two results have no row in common")
    columns = (
        *(words(key, key) for key in after.keys),
        number(f"before ({before.date[:16]})", "before", ".4g"), number("now", statistic, ".4g"),
        number("now / before", "ratio", ".3f"),
    )  # fmt: skip
    return make_table(f"{after.kind.capitalize()}, {statistic}: change", columns, rows)


def _timed(result: Result, columns: Sequence[Column], rows: Sequence[Row], what: str) -> Table:
    protocol, machine = result.protocol, result.machine
    title = (
        f"{result.kind.capitalize()}, {what}; {protocol['threads']} of {machine['cores']} threads, "
        f"{machine['device_name']} ({machine['device']}), torch {result.versions['torch']}, "
        f"{result.date[:16]}"
    )
    notes = [
        f"{row['model']} in {row['runtime']}: {row['failure']}" for row in rows if row["failure"]
    ]
    missing: Mapping[str, Any] = protocol.get("runtimes_missing", {})
    notes += [f"runtime {name!r} {lack}" for name, lack in missing.items()]
    notes += [
        f"{name}: neither timm nor torchvision has it" for name in protocol.get("missing", [])
    ]
    timed = [row for row in rows if row["failure"] is None]
    return make_table(title, columns, timed, [*notes, *_left(result)])


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
