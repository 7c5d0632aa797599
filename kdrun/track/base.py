"""What a tracker is: it shows elsewhere the numbers that metrics.jsonl keeps. It sees a run and never steers it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from kdrun.errors import Problem

Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Tracked:
    """The run as a tracker sees it at its beginning."""

    name: str  # of the run: the end of its folder's path
    group: str  # the recipe
    title: str
    folder: Path
    root: Path  # run.root
    settings: Mapping[str, Any]  # every leaf of the configuration, by key
    kept: Mapping[str, Any]  # what `begin` gave when the run began; empty for a run that is new to the tracker


@dataclass(eq=False)
class Tracker:
    """Base of all trackers: a dataclass whose fields are its settings.

    Every method may raise: the engine then says so once and goes on without the tracker. Nothing is imported before `begin`.
    """

    package: ClassVar[str]  # the one it needs

    def missing(self, key: str) -> list[Problem]:
        """Why it cannot be used here, found without importing anything. `key`: its place in the configuration."""
        try:
            found = importlib.util.find_spec(self.package)
        except ValueError:  # of a module that is there and has no specification
            return []
        if found is not None and found.origin is not None:  # without one it is just a folder of that name
            return []
        return [
            Problem(f"the package {self.package} is not installed", key, "", f'pip install {self.package}, or pip install "kdrun[track]"')
        ]

    def begin(self, run: Tracked) -> dict[str, Any]:
        """Open the run, or go on with it. Returns what finds it again, as plain data; "where" in it is told to the user."""
        raise NotImplementedError

    def stage(self, name: str, step: int) -> None:
        """A training stage begins at `step`, which is above 0 after a resume; later steps that were told before are told again."""

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimiser step, by names such as "loss", "terms/kd" or "test/top1"."""
        raise NotImplementedError

    def summary(self, values: Mapping[str, Any]) -> None:
        """The leaves of the run's summary.json."""

    def end(self, how: Ending) -> None:
        """The run is over, or its process is; one that was stopped may be resumed."""
