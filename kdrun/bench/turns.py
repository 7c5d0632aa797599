"""Cases that take turns, each in a process of its own: what else the machine does hits all alike, and none sees another's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from kdrun.errors import RunFailed

Told = dict[str, Any]  # what a case prints: one JSON object, the last line of its output


class Ratio(NamedTuple):
    """Of two cases' numbers, repetition by repetition: the median, the least and the largest."""

    median: float
    least: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.largest:.3g})"


def in_turns(cases: Mapping[str, Sequence[str]], repeats: int, done: Callable[[str, int], None] | None = None) -> dict[str, list[Told]]:
    """Run `python -m ARGUMENTS` of every case `repeats` times, one after the other; what each printed, by case.

    `done(case, repetition)` is called after each. Raises `RunFailed` with the end of a case's errors where it fails.
    """
    found: dict[str, list[Told]] = {name: [] for name in cases}
    for repetition in range(repeats):
        for name, arguments in cases.items():
            ran = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RunFailed(
                    f"the case {name} failed:\n{ran.stderr[-2000:] or f'killed by signal {-ran.returncode}: too little memory?'}"
                )
            found[name].append(json.loads(ran.stdout.splitlines()[-1]))
            if done:
                done(name, repetition)
    return found


def ratio(over: Sequence[Told], under: Sequence[Told], number: str) -> Ratio:
    """`number` of the first case over that of the second."""
    each = [a[number] / b[number] for a, b in zip(over, under, strict=True)]
    return Ratio(median(each), min(each), max(each))


def middle(told: Sequence[Told], number: str) -> float:
    """The median of a case's number."""
    return float(median(t[number] for t in told))
