"""What the engine tells whoever watches. The base class says nothing; the command line shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Reporter:
    """Receives events; every method may be overridden. `brief`: one of many runs of one comparison; say less."""

    brief = False

    def note(self, text: str) -> None:
        """A decision or a fact worth a line."""

    def run_started(self, title: str, folder: Path, facts: Mapping[str, str]) -> None:
        """A run has its folder."""

    def stage_started(self, name: str, step: int, total_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        """A training stage begins (or goes on) at `step`."""

    def logged(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        """Loss terms and learning rate of a step."""

    def step_done(self, name: str, step: int) -> None:
        """An optimiser step is over (cheap; called every step)."""

    def evaluated(self, name: str, epoch: float, results: Mapping[str, Mapping[str, float]]) -> None:
        """Metrics by split."""

    def stage_done(self, name: str) -> None:
        """A training stage is over."""
