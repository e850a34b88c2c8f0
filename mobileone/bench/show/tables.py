"""Results as tables for a terminal, of the columns that `results.KINDS` lists."""

from collections.abc import Sequence

from matplotlib.ticker import EngFormatter
from rich.markup import escape
from rich.table import Table

from mobileone.bench.paper import UNVERIFIED
from mobileone.bench.results import KINDS, Result, Row, compare_machines

__all__ = [
    "cell",
    "change_table",
    "heading",
    "make_table",
    "notes",
    "result_table",
    "shown",
    "title",
]

_HEADINGS = {
    "acc1_mean": "top-1 (%)",
    "acc1_std": "± (%)",
    "agreement_mean": "as simulated (%)",
    "latency_ms": "ms",
    "float_latency_ms": "float: ms",
    "megabytes": "MB",
    "mmacs": "MACs (M)",
    "params_m": "parameters (M)",
    "params_difference": "parameters: difference (%)",
    "macs_difference": "MACs: difference (%)",
    "paper_table": "paper's table",
    "paper_top1": "paper: top-1 (%)",
    "paper_mmacs": "paper: MACs (M)",
    "paper_params_m": "paper: parameters (M)",
    "ratio": "× ReLU",
    "ratio_median": "× ReLU, median",
    "timm_to": "timm ÷",
    "to_plain": "× plain",
}
_UNITS = {"_ms": " (ms)", "_mib": " (MiB)", "_per_s": "/s"}
_LARGE = EngFormatter(places=2)  # 2078504 -> 2.08 M

# what must agree where two results are compared; a protocol has some of these
_SETTINGS = (
    *("statistic", "threads", "batch_size", "image_size", "device", "images", "amp"),
    *("channels_last", "model", "config", "epochs", "options"),
)


def heading(column: str) -> str:
    """What a column is called, with its unit."""
    if column in _HEADINGS:
        return _HEADINGS[column]
    ending = next((end for end in _UNITS if column.endswith(end)), "")
    words = column.removesuffix(ending) + _UNITS.get(ending, "")
    return words.replace("paper_", "paper: ").replace("_", " ")


def cell(value: object) -> str:
    """A value for people: few digits, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and abs(value) >= 10_000:
        return _LARGE(value)
    return f"{value:.4g}" if isinstance(value, float) else _HEADINGS.get(str(value), str(value))


def shown(result: Result) -> list[Row]:
    """The rows that are shown: of one level, and the paper's numbers marked where unverified."""
    level = result.protocol.get("shown", "model")
    return [_marked(row) for row in result.rows if row.get("level", level) == level]


def _marked(row: Row) -> Row:
    kept = {key: value for key, value in row.items() if key not in ("paper_verified", "level")}
    if not row.get("paper_verified", True):
        for key, value in kept.items():
            if key.startswith("paper_") and isinstance(value, float):
                kept[key] = f"{cell(value)}{UNVERIFIED}"
    return kept


def title(result: Result) -> str:
    """What was measured, how, where and when, in a line."""
    how, machine = result.protocol, result.machine
    given = [key for key in (*_SETTINGS, "runs") if how.get(key) not in (None, [], False)]
    settings = ", ".join(f"{key} {how[key]}" for key in given)
    return (
        f"{result.kind.capitalize()}: {settings}; {machine['device_name']}, "
        f"{machine['cores']} cores, torch {result.versions['torch']}, {result.date[:16]}"
    )


def notes(result: Result) -> list[str]:
    """What a reader must know in addition: what failed, what is missing, what was left."""
    how = result.protocol
    found = [
        f"{', '.join(str(row[key]) for key in result.keys if row.get(key))}: {row[column]}"
        for column in ("failure", "change", "uncounted")
        for row in result.rows
        if row.get(column)
    ]
    found += [f"runtime {name!r} {lack}" for name, lack in how.get("runtimes_missing", {}).items()]
    found += [f"{name}: neither timm nor torchvision has it" for name in how.get("missing", [])]
    left = {
        f"{row['model']}: not folded: {row['branches_left']} layers, {row['norms_left']} BatchNorms"
        for row in result.rows
        if row.get("branches_left") or row.get("norms_left")
    }
    return [*found, *sorted(left), *filter(None, [how.get("note")])]


def result_table(result: Result) -> Table:
    """What was measured, without what failed, which is in the notes."""
    rows = [row for row in shown(result) if row.get("failure") is None]
    columns = [*result.keys, *KINDS[result.kind].columns]
    return make_table(title(result), columns, rows, notes(result))


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()
) -> Table:
    """A table for a terminal, without the columns that are empty, and notes below, a line each."""
    below = escape("\n".join(notes)) or None  # not markup: a package's [extra] has brackets, too
    table = Table(title=escape(title), caption=below, caption_justify="left")
    kept = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    for key in kept:
        numbers = all(not isinstance(row.get(key), str) for row in rows)
        table.add_column(heading(key), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(row.get(key))) for key in kept))
    return table


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
            rows.append(row | {"before": earlier, "now": now, "now / before": now / earlier})
    if not rows:
        raise ValueError("the two results have no row in common")
    caption = f"{after.kind.capitalize()}, {statistic}: change since {before.date[:16]}"
    return make_table(caption, [*after.keys, "before", "now", "now / before"], rows)
