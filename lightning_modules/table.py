"""The CSV file of predictions, visible under its name only when it is complete."""

import csv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

__all__ = ["PredictionTable"]


class PredictionTable:
    """Writes rows to ``<path>.partial`` and renames it to ``path`` at a regular exit.

    Args:
        path: the CSV file; UTF-8, bytes of file names that are not UTF-8 are kept.
        class_names: in the order of the probabilities.
        top_k: how many classes a row names; None for one column of probabilities a class.
    """

    def __init__(self, path: Path, class_names: Sequence[str], top_k: int | None) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._names = class_names
        self._top_k = top_k

    def __enter__(self) -> "PredictionTable":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._writer = csv.writer(self._file)
        columns = ["path", "label", "probability", *self._more_columns(), "error"]
        self._width = len(columns)
        self._writer.writerow(columns)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)

    def write(self, path: str, probabilities: Tensor) -> None:
        """One classified image; ``probabilities`` (classes,)."""
        best = probabilities.topk(self._top_k or 1)
        cells = [
            cell
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            for cell in (self._names[index], _number(value))
        ]
        if self._top_k is None:
            cells += [_number(value) for value in probabilities.tolist()]
        self._writer.writerow([path, *cells, ""])

    def write_error(self, path: str, error: str) -> None:
        """One image that could not be read."""
        self._writer.writerow([path, *[""] * (self._width - 2), error])

    def _more_columns(self) -> list[str]:
        if self._top_k is None:
            return [f"p({name})" for name in self._names]
        ranks = range(2, self._top_k + 1)
        return [f"{column}_{rank}" for rank in ranks for column in ("label", "probability")]


def _number(probability: float) -> str:
    return f"{probability:.6g}"
