"""Reading what the command line says of a refusal."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One problem as it was printed."""

    head: str  # "key: what"
    where: str
    remedy: str

    @property
    def key(self) -> str:
        return self.head.partition(": ")[0]


def parse_problems(text: str) -> list[Problem]:
    """The blocks of a refusal, in order."""
    found = []
    for block in text.split("\n\n")[1:]:
        head, *rest = block.splitlines()
        told = {line[:10].strip(): line[10:] for line in rest if line.startswith("  ") and line[2] != " "}
        more = "\n".join(line.strip() for line in rest if line.startswith(" " * 10))
        found.append(Problem(head, told.get("in", ""), "\n".join(filter(None, [told.get("remedy", ""), more]))))
    return found


def only(problems: list[Problem]) -> Problem:
    """The one problem that there must be."""
    (problem,) = problems
    return problem
