"""Ranks that work apart and meet in between: each does its share of a plan by itself, then all of them hear what each has found.

Other plans share every step of one student over the ranks; where there are many students, a rank can have some of them whole. One
process is the case of one rank, and takes the same path.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from kdrun.errors import EXIT_FAILED, EXIT_STOPPED, KdrunError

T = TypeVar("T")


@dataclass(eq=False)
class Peers:
    """One rank among its like. Whatever passes between them is pickled: tensors on the CPU, plain data."""

    rank: int
    world: int
    home: Path  # the run's folder, which is what is resumed
    _asked: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def owns(self, number: int) -> bool:
        """Whether the work of that number is this rank's."""
        return number % self.world == self.rank

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, by rank, on every rank. Inside it this rank is alone: nothing in it is a collective.

        Raises what it raises; where it fails on another rank, a `KdrunError` with the words and the exit code of that failure. So
        no rank waits for one that has given up. A stop that was asked for by a signal is such a failure (exit code 75).
        """
        found: T | None = None
        failed: Exception | None = None
        try:
            self._stop_if_asked()
            with _alone():
                found = work()
            self._stop_if_asked()
        except Exception as error:
            if self.world == 1:
                raise
            failed = error
        told = self.gather((found, _words(failed)))
        if failed is not None:
            raise failed
        for _, words in told:
            if words is not None:
                raise _failure(*words)
        return [what for what, _ in told]  # type: ignore[misc]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank. As objects: bytes of any length, which gloo sends from the CPU and NCCL by way of the GPU."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop at the next meeting: a rank that waits for others must not die of them, or the others would
        wait for it. A training stage listens by itself meanwhile; a second signal is taken at its word."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked.is_set():
                raise KeyboardInterrupt
            self._asked.set()

        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        if self._asked.is_set():
            raise _failure(f"stopped between two stages; go on with: kdrun resume {self.home}", EXIT_STOPPED)


def ranks_of(hardware: Mapping[str, Any]) -> int:
    """How many ranks this run has; where they are not started yet, as many as its configuration says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return hardware["procs"] or 1


@contextmanager
def _alone() -> Iterator[None]:
    """No process group is to be seen. torchmetrics adds up over whatever group there is: one client's hits would be another's."""
    group = dist.group.WORLD if dist.is_available() else None
    if group is None:
        yield
        return
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = group


def _words(failed: Exception | None) -> tuple[str, int] | None:
    """A failure as it travels: exceptions of several arguments do not survive pickling."""
    if failed is None:
        return None
    known = isinstance(failed, KdrunError)
    return (str(failed), failed.exit_code) if known else (f"{type(failed).__name__}: {failed}", EXIT_FAILED)  # type: ignore[attr-defined]


def _failure(message: str, exit_code: int) -> KdrunError:
    error = KdrunError(message)
    error.exit_code = exit_code
    return error
