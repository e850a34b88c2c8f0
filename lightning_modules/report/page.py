"""One page of a folder of results and a run, to read without anything else and to send."""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_modules.report.run_sections import read_run
from mobileone.bench.paper import paper_table
from mobileone.bench.results import Result, Row
from mobileone.bench.show.tables import cell, heading, notes, shown
from mobileone.bench.studies.pareto import draw_pareto
from mobileone.io.atomic import replace_text

__all__ = ["write_report"]

_ROWS = 80  # of a table on the page; the file has all
_QUOTED = ("params_m", "mmacs", "top1", "mobile_ms")
_RUN_RECORD = "run.json"


def write_report(
    folder: str | Path,
    run: str | Path | None = None,
    output: str | Path | None = None,
    title: str = "MobileOne report",
) -> Path:
    """Gather measurements and a run into one HTML file.

    The file needs no network and no other file: images are inside, and it runs no script. What is
    missing is named, with the command that makes it.

    Args:
        folder: Results (JSON files of `mobileone profile`, `benchmark`, `study`), here or one
            folder deeper, with their charts next to them. It may be a run folder itself.
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
    results, unreadable = _find_results(folder)
    if run is None and not results:
        raise ValueError(
            f"`folder` (={str(folder)!r}) holds neither results nor a run: make some with "
            "`mobileone benchmark`, `profile` or `study`, or name a run with --run"
        )
    about = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}; results: {folder.resolve().name}"
    final = (Path(output).expanduser() if output else folder) / "report.html"
    text = _environment().get_template("report.html.j2").render(
        title=title,
        about=about if run is None else f"{about}; run: {run.parent.name}/{run.name}",
        family=_family(list(results.values())),
        pareto=_pareto(results),
        run=None if run is None else read_run(run),
        results=[_shown(path, result, folder) for path, result in results.items()],
        unreadable=unreadable,
    )  # fmt: skip
    replace_text(final, text.lstrip())
    return final


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lightning_modules", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {
        "base64": lambda png: base64.b64encode(png).decode("ascii"),
        "cell": cell,
        "is_numeric": lambda rows, key: not any(isinstance(row.get(key), str) for row in rows),
        "metrics": lambda metrics: "; ".join(f"{k} {v:.4g}" for k, v in metrics.items()) or "none",
    }
    return environment


def _folder(path: str | Path, name: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_dir():
        raise FileNotFoundError(
            f"`{name}` (={str(path)!r}) is not a folder: give one that a measurement has written "
            "with --output, or a run folder"
        )
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


def _find_results(folder: Path) -> tuple[dict[Path, Result], list[str]]:
    """The results by file, and what is wrong with the files that cannot be shown."""
    results, unreadable = {}, []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            unreadable.append(f"{path.relative_to(folder)}: not JSON")
            continue
        if not isinstance(content, dict) or "kind" not in content or "rows" not in content:
            continue  # the record of a run, a manifest, …
        try:
            result = Result.load(path)
            for row in result.rows:
                missing = [name for name in _COLUMNS.get(result.kind, ()) if name not in row]
                if missing:
                    lack = f"a row has no {', '.join(missing)}"
                    raise ValueError(f"{path} is not a complete result: {lack}")
            results[path] = result
        except ValueError as error:
            unreadable.append(str(error))
    return results, unreadable


# what the page itself reads of a row
_COLUMNS = {
    "profile": ("model", "level", "parameters", "macs"),
    "latency": ("model", "runtime", "threads"),
}


def _family(results: Sequence[Result]) -> dict[str, Any]:
    """The models of the paper's Tables 9 and 13, with what was measured of them here."""
    columns = {"model": "model", "params_m": "parameters (M)", "mmacs": "MACs (M)"}
    columns |= {"top1": "top-1 (%), paper", "mobile_ms": "iPhone 12 (ms), paper"}
    tables = [paper_table(9), paper_table(13)]
    rows: dict[str, Row] = {
        row["build"]: {"model": row["build"]}
        | {key: row[key] if table.verified else table.mark(row[key]) for key in _QUOTED}
        for table in tables
        for row in table.rows
        if str(row["build"]).startswith("mobileone_")
    }
    counted = False
    for result in sorted(results, key=_when):  # the newest counts
        for row in result.rows:
            own = rows.get(str(row.get("model")))
            if own is None:
                continue
            if result.kind == "profile" and row["level"] == "model":
                own |= {"own_params": row["parameters"] / 1e6, "own_macs": row["macs"] / 1e6}
                counted = True
            elif result.kind == "latency" and row.get("failure") is None:
                place = f"{row['runtime']}, {result.statistic.removesuffix('_ms')}, "
                place += f"{row['threads']} thread(s), {result.machine_id}"
                own[place] = row.get(result.statistic)
                columns[place] = f"{place} (ms), here"
    timed = len(columns) > 5
    if counted:
        columns |= {"own_params": "parameters (M), counted here", "own_macs": "MACs (M), here"}
    source = "; ".join(table.caption for table in tables)
    return {"columns": columns, "rows": list(rows.values()), "source": source,
            "counted": counted, "timed": timed}  # fmt: skip


def _pareto(results: Mapping[Path, Result]) -> dict[str, Any]:
    """The paper's Figure 1, with the newest latencies on top."""
    timed = [path for path, result in results.items() if result.kind == "latency"]
    fault = None if timed else "no latency was measured here"
    with tempfile.TemporaryDirectory() as folder:
        if timed:
            try:
                newest = max(timed, key=lambda path: _when(results[path]))
                draw_pareto([str(newest)], output=folder)
            except ValueError as error:
                fault = str(error)
        if fault is not None:
            draw_pareto(output=folder)
        return {"png": (Path(folder) / "pareto.png").read_bytes(), "fault": fault}


def _when(result: Result) -> datetime:
    return datetime.fromisoformat(result.date)


def _shown(path: Path, result: Result, folder: Path) -> dict[str, Any]:
    """A result: columns without a value are left out, those of one value are shown once."""
    machine, picture = result.machine, path.with_suffix(".png")
    rows = shown(result)[:_ROWS]
    values = {key: {repr(row.get(key)) for row in rows} for row in rows for key in row}
    kept = {key: heading(key) for key, found in values.items() if found != {"None"}}
    same = [key for key in kept if len(rows) > 3 and len(values[key]) == 1]
    about = {"protocol": result.protocol, "machine": machine, "versions": result.versions}
    where = f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('os')}"
    return {
        "name": path.stem.replace("_", " "),
        "path": str(path.relative_to(folder)),
        "date": result.date,
        "where": f"{where} ({result.machine_id})",
        "png": picture.read_bytes() if picture.is_file() else None,
        "rows": rows,
        "columns": {key: heading for key, heading in kept.items() if key not in same},
        "constant": {kept[key]: rows[0].get(key) for key in same},
        "left_out": len(result.rows) - len(rows),
        "notes": notes(result),
        "about": json.dumps(about, indent=2),
    }
