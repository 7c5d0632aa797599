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

    def evaluated(self, name: str, epoch: float, results: Mapping[str, Mapping[str, float]], step: int = 0) -> None:
        """Metrics by split, after `step` optimiser steps."""

    def stage_done(self, name: str) -> None:
        """A training stage is over."""

    def run_done(self, summary: Mapping[str, Any]) -> None:
        """The run has its summary."""


class Reporters(Reporter):
    """Several of them, told in order."""

    def __init__(self, *each: Reporter) -> None:
        self.each = each
        self.brief = any(reporter.brief for reporter in each)

    def note(self, text: str) -> None:
        for reporter in self.each:
            reporter.note(text)

    def run_started(self, title: str, folder: Path, facts: Mapping[str, str]) -> None:
        for reporter in self.each:
            reporter.run_started(title, folder, facts)

    def stage_started(self, name: str, step: int, total_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        for reporter in self.each:
            reporter.stage_started(name, step, total_steps, steps_per_epoch, batch_size)

    def logged(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        for reporter in self.each:
            reporter.logged(name, step, record)

    def step_done(self, name: str, step: int) -> None:
        for reporter in self.each:
            reporter.step_done(name, step)

    def evaluated(self, name: str, epoch: float, results: Mapping[str, Mapping[str, float]], step: int = 0) -> None:
        for reporter in self.each:
            reporter.evaluated(name, epoch, results, step)

    def stage_done(self, name: str) -> None:
        for reporter in self.each:
            reporter.stage_done(name)

    def run_done(self, summary: Mapping[str, Any]) -> None:
        for reporter in self.each:
            reporter.run_done(summary)
