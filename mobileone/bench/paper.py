"""The paper's numbers (Vasu et al., CVPR 2023, arXiv 2206.04040): `paper.json`, read."""

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

from mobileone.bench.results import Row

__all__ = ["UNVERIFIED", "PaperTable", "paper_row", "paper_table", "paper_tables"]

UNVERIFIED = " (unverified)"
"""What marks a number, or a table's title, that was not checked against the paper itself."""


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Attributes:
        number: Its number.
        title: What it shows, in our words.
        source: Where it is.
        verified: Whether its numbers were read in the paper itself. If not, `mark` whatever is
            shown of them.
        note: What a reader must know in addition; may be empty.
        columns: Heading, with the unit, of each column. `build` is the name by which timm (or
            torchvision, with the prefix `torchvision/`) has the model; None: neither has it.
        rows: The numbers.
    """

    number: int
    title: str
    source: str
    verified: bool
    note: str
    columns: dict[str, str]
    rows: tuple[Row, ...]

    def mark(self, text: object) -> str:
        """`text`, marked where the table is unverified."""
        return str(text) if self.verified else f"{text}{UNVERIFIED}"

    @property
    def caption(self) -> str:
        """Title, source and note in a line, marked where the table is unverified."""
        caption = f"{self.title} ({self.source}{'' if self.verified else '; unverified'})"
        return f"{caption}. {self.note}" if self.note else caption


def paper_table(number: int) -> PaperTable:
    """One table.

    Raises:
        ValueError: It is not recorded here.
    """
    tables = paper_tables()
    if number not in tables:
        listed = ", ".join(map(str, tables))
        raise ValueError(f"`number` (={number}): the tables recorded here are {listed}")
    return tables[number]


@cache
def paper_tables() -> dict[int, PaperTable]:
    """All tables that are recorded, by number."""
    text = files("mobileone.bench").joinpath("paper.json").read_text(encoding="utf-8")
    names = {field.name for field in fields(PaperTable)} - {"number", "rows"}
    tables = {}
    for number, content in json.loads(text).items():
        rows = tuple(content.pop("rows"))
        assert set(content) == names, f"table {number}"
        tables[int(number)] = PaperTable(int(number), rows=rows, **content)
    return tables


def paper_row(model: str) -> Row | None:
    """What the paper measured of a model: its row of Table 9, or of 13 for the micro variants.

    Args:
        model: Name as timm has it; the tag of the weights, after a dot, does not matter.

    Returns:
        `model`, `build`, `top1` (%), `mmacs` (M), `params_m` (M), `mobile_ms`, in Table 9 also
        `cpu_ms` and `gpu_ms`; None where the paper has no such model.
    """
    plain = model.partition(".")[0]
    for number in (9, 13):
        for row in paper_table(number).rows:
            if row["build"] == plain:
                return row
    return None
