"""What a report is made of, apart from how it is shown: sections of words, tables and charts, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["lines", "scatter", "bars", "reliability"]


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row; the others are set to the right where `numbers` is true."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: bool = True
    strong: tuple[int, ...] = ()  # rows that are set apart


@dataclass(frozen=True)
class Point:
    """One number with its interval; `low` is None where there is none. `weight`: how much lies behind it, for its size."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    weight: float = 1.0
    label: str = ""


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    colour: int  # which of the palette; an arm has one colour in all charts of its board


@dataclass(frozen=True)
class Chart:
    kind: Kind
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False


@dataclass(frozen=True)
class Section:
    """`about` tells a stranger what is shown; `words` are findings, and what was not recorded; `data` has the numbers for machines."""

    key: str
    title: str
    about: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    data: Any = None


@dataclass(frozen=True)
class BoardReport:
    """All of the runs that were measured in one way."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]


@dataclass(frozen=True)
class Report:
    title: str
    made: str
    boards: Sequence[BoardReport]
    runs: Table
    remarks: Sequence[str] = field(default_factory=list)

    def to_document(self) -> Mapping[str, Any]:
        """Plain data for `--json`."""
        boards = [{"title": b.title, "summary": list(b.summary), "sections": {s.key: _section(s) for s in b.sections}} for b in self.boards]
        runs = [dict(zip(self.runs.columns, row, strict=True)) for row in self.runs.rows]
        return {"title": self.title, "made": self.made, "boards": boards, "runs": runs, "remarks": list(self.remarks)}


def _section(section: Section) -> dict[str, Any]:
    told = asdict(section)
    return {name: told[name] for name in ("title", "words", "tables", "charts", "data")}
