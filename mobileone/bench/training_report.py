"""The cost of training steps as a table and as a chart."""

from matplotlib.figure import Figure
from rich.table import Table

from mobileone.bench.results import Result, Row
from mobileone.bench.show.charts import COLORS, HATCHES

__all__ = ["training_figure", "training_table"]

_PANELS = (("seconds", "s a step"), ("kept_mib", "MiB kept for backward, an image"))


def training_table(result: Result) -> Table:
    """The rows for a terminal, with times relative to timm's and to the plain net's."""
    table = Table(title=f"Training step, {_setting(result)}, torch {result.versions['torch']}")
    for heading in ("model", "contender"):
        table.add_column(heading)
    for heading in ("step (s)", "× plain", "timm ÷", "CPU (s)", "kept (MiB/image)", "peak"):
        table.add_column(heading, justify="right")
    measured = [row for row in result.rows if row["failure"] is None]
    for row in measured:
        table.add_row(
            row["model"],
            row["contender"],
            f"{row['seconds']:.3f} ± {row['spread_seconds'] / 2:.3f}",
            _number(row["to_plain"], ".2f"),
            _number(row["timm_to"], ".2f"),
            _number(row["cpu_seconds"], ".3f"),
            _number(row["kept_mib"], ".1f"),
            _number(row["peak_mib"], ".1f"),
        )
    notes = [
        f"{row['model']}, {row['contender']}: {row[column]}"
        for column in ("failure", "change")
        for row in result.rows
        if row.get(column) is not None
    ]
    table.caption = "\n".join(notes) or None
    table.caption_justify = "left"
    return table


def training_figure(result: Result) -> Figure:
    """Bars of time and of kept memory, by model and contender."""
    models = list(dict.fromkeys(row["model"] for row in result.rows))
    names = list(dict.fromkeys(row["contender"] for row in result.rows))
    rows = {(row["model"], row["contender"]): row for row in result.rows}
    figure = Figure(figsize=(5 + 2.2 * len(models), 4.6), layout="constrained")
    thickness = 0.88 / len(names)
    for axes, (column, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for i, name in enumerate(names):
            values = [_value(rows[model, name], column) for model in models]
            places = [m + (i - (len(names) - 1) / 2) * thickness for m in range(len(models))]
            axes.bar(
                places,
                values,
                0.92 * thickness,
                label=name,
                color=COLORS[i % len(COLORS)],
                hatch=HATCHES[i % len(HATCHES)],
                edgecolor="white",
            )
            for place, value in zip(places, values, strict=True):
                text = f" {value:.3g}" if value else " failed"
                axes.text(place, value, text, rotation=90, ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(models)), models)
        axes.set_ylabel(label)
        axes.margins(y=0.16)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"Training step: {_setting(result)}", fontsize=10)
    return figure


def _setting(result: Result) -> str:
    how, machine = result.protocol, result.machine
    autocast = ", autocast to bfloat16" if how["amp"] else ""
    layout = ", channels-last" if how["channels_last"] else ""
    kind = "photographs" if how.get("images") == "photos" else "noise images"  # as older results
    return (
        f"{how['batch_size']} {kind} of {how['image_size']} px{layout}{autocast}, "
        f"{machine['device_name']} ({machine['device']}), "
        f"{how['threads']} of {machine['cores']} threads"
    )


def _value(row: Row, column: str) -> float:
    value = row.get(column)
    return 0.0 if value is None else float(value)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
