"""A reader that goes away (`kdrun ls | head`) ends the command without a traceback, and not with the status of a failed run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

EXIT_NO_READER = 128 + 13  # what a shell sees of a program that SIGPIPE ends, as it ends cat and grep


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Inside Typer, which would make of it the status 1. What is still buffered goes to nowhere, as Python's documentation advises:
    the interpreter flushes once more at its end."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
        raise typer.Exit(EXIT_NO_READER) from None


def silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Verbs(TyperGroup):
    """The verbs as a group that minds its reader, in its own help and in theirs."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with readers_may_leave():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with readers_may_leave():
            return super().invoke(ctx)
