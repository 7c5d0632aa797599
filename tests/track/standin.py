"""A tracker that keeps what it was told, and breaks where it is told to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kdrun.track.base import Ending, Tracked, Tracker


@dataclass(eq=False)
class StandIn(Tracker):
    package: ClassVar[str] = "json"
    told: ClassVar[list[tuple[Any, ...]]] = []

    breaks: str = ""  # the method that raises

    def _hear(self, method: str, *words: Any) -> None:
        if method == self.breaks:
            raise OSError(28, "No space left on device")
        self.told.append((method, *words))

    def begin(self, run: Tracked) -> dict[str, Any]:
        self._hear("begin", run)
        return {"id": run.kept.get("id", "first"), "where": "nowhere"}

    def stage(self, name: str, step: int) -> None:
        self._hear("stage", name, step)

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._hear("numbers", stage, step, dict(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._hear("summary", dict(values))

    def end(self, how: Ending) -> None:
        self._hear("end", how)


@dataclass(eq=False)
class Absent(StandIn):
    package: ClassVar[str] = "no_such_tracker"
