"""The terminal: colours where there is one, plain text where there is not (rich honours NO_COLOR)."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.errors import KdrunError

PLAIN_WIDTH = 200  # a pipe has no width; do not wrap at 80


@cache
def out() -> Console:
    return _console(stderr=False)


@cache
def err() -> Console:
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program with the status of a failed run
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    return Terminal(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False, soft_wrap=False)


def count(number: float) -> str:
    """A large number with its prefix: 4736 -> 4.7 k, 354_100_000 -> 354.1 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {prefix}"
    return f"{number:g}"


def print_json(value: Any) -> None:
    """One machine-readable object on standard output."""
    from kdrun.strict_json import to_json

    print(to_json(value, indent=2))


def complain(error: KdrunError) -> None:
    """What a user reads instead of a traceback."""
    from rich.markup import escape

    from kdrun.errors import Refused

    console = err()
    if isinstance(error, Refused):
        count = len(error.problems)
        console.print(f"[bold red]refused[/]: {count} problem{'s' if count > 1 else ''}; nothing was started")
        for problem in error.problems:
            head, *rest = str(problem).splitlines()
            console.print(f"\n[bold]{escape(head)}[/]", soft_wrap=True)
            for line in rest:
                console.print(escape(line), soft_wrap=True)
    else:
        word = {75: "stopped", 3: "check failed"}.get(error.exit_code, "failed")
        console.print(f"[bold red]{word}[/]: {escape(str(error))}", soft_wrap=True)
