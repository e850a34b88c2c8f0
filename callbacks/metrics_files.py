"""Read back what Lightning's CSV logger wrote, over all resumes of a run."""

import csv
from collections import defaultdict
from pathlib import Path

__all__ = ["read_curves"]

_EVALUATED = ("val/", "test/", "step", "epoch")


def read_curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The points of every metric.

    Args:
        folder: Holds `version_0`, `version_1` …, one for each resume; where two tell of the same
            step, the later one counts, for it replaced what was lost. A version with metrics of
            validation or test alone is that of an evaluation, whose steps mean nothing, and is
            left out.

    Returns:
        Points (step, value) by metric, in the order of the steps.
    """
    points: dict[str, dict[int, float]] = defaultdict(dict)
    files = sorted(Path(folder).glob("version_*/metrics.csv"), key=_version)
    for file in files:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            if all(name.startswith(_EVALUATED) for name in rows.fieldnames or ()):
                continue
            for row in rows:
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        points[name][int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in points.items()}


def _version(file: Path) -> int:
    return int(file.parent.name.removeprefix("version_"))
