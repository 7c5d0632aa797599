"""Errors for people: what is wrong, where, the nearest legal value, the change to make.

Exit codes: 0 ok, 1 failed run, 2 refused configuration, 3 failed check, 75 stopped by a signal and resumable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_CHECK, EXIT_STOPPED = 0, 1, 2, 3, 75


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration or its inputs."""

    what: str  # "unknown key"
    key: str = ""  # dotted key or path that it is about
    where: str = ""  # file, or "command line"
    remedy: str = ""  # the change to make

    def __str__(self) -> str:
        head = f"{self.key}: {self.what}" if self.key else self.what
        lines = [head]
        if self.where:
            lines.append(f"  in      {self.where}")
        if self.remedy:
            lines.append(f"  remedy  {self.remedy}")
        return "\n".join(lines)


class KdrunError(Exception):
    """Base of what kdrun says without a traceback."""

    exit_code = EXIT_FAILED


class Refused(KdrunError):
    """The configuration or an input is refused before anything is spent (exit code 2). Carries all problems at once."""

    exit_code = EXIT_REFUSED

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RunFailed(KdrunError):
    """A run that started and could not go on (exit code 1)."""


class CheckFailed(KdrunError):
    """A check that was asked for did not hold (exit code 3)."""

    exit_code = EXIT_CHECK


def nearest(word: str, legal: Iterable[str], limit: int = 3) -> list[str]:
    """The legal words most like `word`, best first."""
    return difflib.get_close_matches(word, sorted(set(legal)), n=limit, cutoff=0.5)


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """A remedy: the nearest legal values, or all of them if none is near and they are few."""
    legal = sorted(set(legal))
    close = nearest(word, legal)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = ", ".join(legal[:12]) + (", ..." if len(legal) > 12 else "")
    return f"legal values: {shown}" if legal else ""
