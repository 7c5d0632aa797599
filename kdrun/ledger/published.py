"""The number that a paper prints for a choice of teacher, student and objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a cell does not depend on: a student trained from labels has no teacher.
WITHOUT = {"ce": "teacher", "sft": "teacher", "teacher": "student"}


@dataclass(frozen=True)
class PublishedValue:
    """One cell of a published table."""

    value: float
    spread: float | None  # standard deviation over the published runs
    n: int | None
    metric: str
    table: str
    protocol: str


def lookup(published: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], name: str, metric: str | None = None) -> PublishedValue | None:
    """The cell of `name` (an objective or "teacher") in the first row whose conditions hold, or None.

    A row is {if: [teacher=resnet32x4, student=resnet8x4], pld: [73.97, 0.05], at: 71.99, ...}: a value, or a value and
    its standard deviation. Conditions speak of groups or of leaves (student.name=resnet50); `facts` has both.
    `metric`: look only into tables of this one.
    """
    for table in published:
        if metric is not None and table.get("metric", "top1") != metric:
            continue
        for row in table.get("rows", []):
            if name not in row or not _meets(row.get("if", []), facts, WITHOUT.get(name)):
                continue
            cell = row[name] if isinstance(row[name], (list, tuple)) else [row[name]]
            spread = float(cell[1]) if len(cell) > 1 else None
            return PublishedValue(
                float(cell[0]), spread, table.get("n"), table.get("metric", "top1"), table.get("table", ""), table.get("protocol", "last")
            )
    return None


def _meets(conditions: Sequence[str], facts: Mapping[str, Any], ignored: str | None) -> bool:
    pairs = [str(c).partition("=")[::2] for c in conditions]
    return all(str(facts.get(key)) == value for key, value in pairs if key.split(".")[0] != ignored)
