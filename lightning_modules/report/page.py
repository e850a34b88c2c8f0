"""One page of a folder of results and a run, to read without anything else and to send."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_modules.report.html import (
    Html,
    details,
    note,
    number,
    page,
    png_image,
    section,
    table,
    text,
)
from lightning_modules.report.run_sections import run_facts, run_sections
from mobileone.bench.paper import UNVERIFIED, paper_table
from mobileone.bench.results import Result, Row
from mobileone.bench.studies.pareto import draw_pareto
from mobileone.io.atomic import replace_text

__all__ = ["write_report"]

_ROWS = 80  # of a table on the page; the file has all
_QUOTED = {"params_m": "{:g}", "mmacs": "{:.0f}", "top1": "{:.1f}", "mobile_ms": "{:.2f}"}
_RUN_RECORD = "run.json"


def write_report(
    folder: str | Path,
    run: str | Path | None = None,
    output: str | Path | None = None,
    title: str = "MobileOne report",
) -> Path:
    """Gather measurements and a run into one HTML file.

    The file needs no network and no other file: images are inside, and it runs no script. What is
    missing is said, with the command that makes it.

    Args:
        folder: Results (JSON files of `mobileone profile`, `benchmark`, `study`), here or one
            folder deeper, with their charts beside them. It may be a run folder itself.
        run: A run folder, as `mobileone fit` writes it; None: `folder`, if that is one.
        output: Folder for report.html; None: `folder`.
        title: Heading of the page.

    Returns:
        The file.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: `run` is not a run folder, `output` a file, or there is nothing to show.
    """
    if output is not None and Path(output).suffix == ".html":
        raise ValueError(f"`output` (={str(output)!r}) must be a folder, for report.html")
    folder = _folder(folder, "folder")
    run = _run_folder(folder, run)
    found = _find_results(folder)
    if run is None and not found.results:
        raise ValueError(
            f"`folder` (={str(folder)!r}) holds neither results nor a run: make some with "
            "`mobileone benchmark`, `profile` or `study`, or name a run with --run"
        )
    sections = [
        section("The family", _family(found.results)),
        section("Accuracy against latency", _pareto(found.results)),
    ]
    if run is None:
        missing = "No run is shown: name one with --run, for example runs/quickstart/latest."
        sections.append(section("Training", [note(missing)]))
    else:
        sections += run_sections(run)
    sections += [_result_section(path, result, folder) for path, result in found.results]
    if found.unreadable or not found.results:
        sections.append(section("Not shown", _not_shown(found)))
    final = (Path(output).expanduser() if output else folder) / "report.html"
    replace_text(final, page(title, _head(folder, run), sections))
    return final


@dataclass(frozen=True)
class _Found:
    results: list[tuple[Path, Result]]
    unreadable: list[str]


def _folder(path: str | Path, name: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_dir():
        raise FileNotFoundError(f"`{name}` (={str(path)!r}) is not a folder")
    return found


def _run_folder(folder: Path, run: str | Path | None) -> Path | None:
    if run is None:
        return folder if (folder / _RUN_RECORD).is_file() else None
    path = _folder(run, "run")
    if not (path / _RUN_RECORD).is_file():
        raise ValueError(
            f"`run` (={str(run)!r}) is not a run folder: it has no {_RUN_RECORD}; take one that "
            "`mobileone fit` wrote, for example runs/quickstart/latest"
        )
    return path.resolve()  # `latest` may point elsewhere tomorrow


def _find_results(folder: Path) -> _Found:
    results, unreadable = [], []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            unreadable.append(f"{path.relative_to(folder)}: not JSON")
            continue
        if not isinstance(content, dict) or "kind" not in content or "rows" not in content:
            continue  # the record of a run, a manifest, …
        try:
            results.append((path, _whole(path, Result.load(path))))
        except ValueError as error:
            unreadable.append(str(error))
    return _Found(results, unreadable)


# what the page itself reads of a row
_COLUMNS = {
    "profile": ("model", "level", "parameters", "macs"),
    "latency": ("model", "runtime", "threads"),
}


def _whole(path: Path, result: Result) -> Result:
    for row in result.rows:
        if missing := [name for name in _COLUMNS.get(result.kind, ()) if name not in row]:
            raise ValueError(f"{path} is not a whole result: a row has no {', '.join(missing)}")
    return result


def _head(folder: Path, run: Path | None) -> Iterator[Html]:
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    names = f"results: {folder.resolve().name}"
    if run is not None:
        names += f"; run: {run.parent.name}/{run.name}"
    yield Html(f'<p class="soft">{text(now)}; {text(names)}</p>')
    facts = {} if run is None else run_facts(run)
    if facts:
        boxes = (f"<div><b>{text(v)}</b>{text(k)}</div>" for k, v in facts.items())
        yield Html(f'<div class="facts">{"".join(boxes)}</div>')


def _family(results: Sequence[tuple[Path, Result]]) -> list[Html]:
    """The models of the paper's Tables 9 and 13, with what was measured of them here."""
    profiles = _newest(results, "profile")
    latencies = _newest(results, "latency")
    columns = {"model": "model", "params_m": "parameters (M)", "mmacs": "MACs (M)"}
    columns |= {"top1": "top-1 (%), paper", "mobile_ms": "iPhone 12 (ms), paper"}
    rows: list[dict[str, Any]] = []
    for number_ in (9, 13):
        source = paper_table(number_)
        for row in source.rows:
            if str(row["build"]).startswith("mobileone_"):
                quoted = {k: source.mark(form.format(row[k])) for k, form in _QUOTED.items()}
                rows.append({"model": row["build"]} | quoted)
    parts: list[Html] = []
    for row in rows:
        counted = profiles.get((row["model"], None))
        row["own_params"] = None if counted is None else counted["parameters"] / 1e6
        row["own_macs"] = None if counted is None else counted["macs"] / 1e6
        for (model, runtime), measured in latencies.items():
            if model == row["model"]:
                row[f"ms {runtime}"] = measured
                columns[f"ms {runtime}"] = f"{runtime} (ms), here"
    if any(row["own_macs"] is not None for row in rows):
        columns |= {"own_params": "parameters (M), counted here", "own_macs": "MACs (M), here"}
    else:
        parts.append(note("Nothing was counted here: `mobileone profile` does."))
    if not latencies:
        parts.append(note("No latency was measured here: `mobileone benchmark latency` does."))
    sources = "; ".join(dict.fromkeys(paper_table(n).caption for n in (9, 13)))
    caption = Html(f'<p class="soft">Paper: {text(sources)}</p>')
    return [table(columns, rows), caption, *parts]


def _pareto(results: Sequence[tuple[Path, Result]]) -> list[Html]:
    """The paper's Figure 1, with the newest latency result on top."""
    timed = [item for item in results if item[1].kind == "latency"]
    timed.sort(key=lambda item: datetime.fromisoformat(item[1].date))
    with tempfile.TemporaryDirectory() as folder:
        parts: list[Html] = []
        try:
            if timed:
                path, result = timed[-1]
                there = [row["runtime"] for row in result.rows if row.get("failure") is None]
                runtime = "onnxruntime" if "onnxruntime" in there else there[0] if there else ""
                png, _ = draw_pareto([str(path)], runtime, output=folder)
            else:
                png, _ = draw_pareto(output=folder)
                parts = [note("Only the paper's numbers: no latency was measured here.")]
        except ValueError as error:
            parts = [note(f"Only the paper's numbers: {error}.")]
            png, _ = draw_pareto(output=folder)
        image = png_image(png.read_bytes(), "accuracy against latency, with the Pareto fronts")
    return [Html(f'<div class="chart">{image}</div>'), *parts]


def _newest(results: Sequence[tuple[Path, Result]], kind: str) -> dict[tuple[str, Any], Any]:
    """By model and runtime: the row of a profile, or the time that a protocol quotes."""
    found: dict[tuple[str, Any], Any] = {}
    for _, result in sorted(results, key=lambda item: datetime.fromisoformat(item[1].date)):
        for row in result.rows if result.kind == kind else ():
            if kind == "profile" and row.get("level") == "model":
                found[row["model"], None] = row
            elif kind == "latency" and row.get("failure") is None:
                statistic = str(result.protocol.get("statistic", "min_ms"))
                value = row.get(statistic)
                place = f"{row['runtime']}, {statistic.removesuffix('_ms')}"
                place += f", {row['threads']} thread(s), {result.machine_id}"
                found[row["model"], place] = value
    return found


def _result_section(path: Path, result: Result, folder: Path) -> tuple[str, Html]:
    machine = result.machine
    where = f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('os')}"
    parts: list[Html] = [
        Html(
            f'<p class="soft">{text(path.relative_to(folder))}; {text(result.date)}; '
            f"{text(where)} ({text(result.machine_id)})</p>"
        )
    ]
    picture = path.with_suffix(".png")
    if picture.is_file():
        image = png_image(picture.read_bytes(), f"chart of {path.stem}")
        parts.append(Html(f'<div class="chart">{image}</div>'))
    rows = [row for row in result.rows if row.get("level", "model") == "model"]
    left_out = len(result.rows) - min(len(rows), _ROWS)
    rows = [_marked(row) for row in rows[:_ROWS]]
    columns = {k: _heading(k) for k in dict.fromkeys(k for row in rows for k in row)}
    columns = {k: v for k, v in columns.items() if any(row.get(k) is not None for row in rows)}
    constant = {
        k for k in columns if len(rows) > 3 and len({repr(row.get(k)) for row in rows}) == 1
    }
    varying = {k: v for k, v in columns.items() if k not in constant}
    parts.append(table(varying, rows) if rows else note("It has no rows."))
    if constant:
        same = "; ".join(
            f"{columns[k]}: {number(rows[0].get(k))}" for k in columns if k in constant
        )
        parts.append(Html(f'<p class="soft">In all rows: {text(same)}</p>'))
    if left_out:
        parts.append(Html(f'<p class="soft">{left_out} more rows are in the file.</p>'))
    parts.append(details("protocol, machine, versions", json.dumps(
        {"protocol": result.protocol, "machine": machine, "versions": result.versions}, indent=2
    )))  # fmt: skip
    return section(f"Measured: {path.stem.replace('_', ' ')}", parts)


def _marked(row: Row) -> Row:
    """The row with the paper's numbers marked where they are unverified, instead of a column."""
    verified = row.get("paper_verified", True)
    kept = {key: value for key, value in row.items() if key != "paper_verified"}
    for key, value in kept.items():
        if not verified and key.startswith("paper_") and isinstance(value, float):
            kept[key] = f"{number(value)}{UNVERIFIED}"
    return kept


def _heading(key: str) -> str:
    words = key.replace("_", " ")
    if words.endswith(" ms"):
        return f"{words.removesuffix(' ms')} (ms)"
    return words


def _not_shown(found: _Found) -> list[Html]:
    parts = [note(reason) for reason in found.unreadable]
    if not found.results:
        parts.append(
            note(
                "The folder has no results: `mobileone benchmark`, `profile` and `study` make them."
            )
        )
    return parts
