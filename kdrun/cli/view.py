"""Watching a run: a live view on a terminal, plain lines in a pipe, silence for --json and --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kdrun.cli.console import err, out
from kdrun.engine.report import Reporter
from kdrun.evaluation.metrics import KINDS, kind

MOST_METRICS = 7  # of a split on one line

PLAIN_SECONDS = 10.0  # between two progress lines in a pipe


@contextmanager
def make_reporter(json: bool, quiet: bool) -> Iterator[Reporter]:
    """The reporter for this terminal; progress goes to standard error if standard output carries JSON."""
    if quiet or json:
        yield Reporter()
    elif sys.stdout.isatty():
        live = LiveReporter(out())
        with live.progress:
            yield live
    else:
        yield PlainReporter(err() if json else out())


def terms_text(record: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in record["terms"].items())


def metrics_text(results: Mapping[str, Mapping[str, float]]) -> str:
    """Of each split its first metrics, in the order of the evaluation; those of single classes stand in the files alone."""
    return "; ".join(f"{split}: {' '.join(_metric(k, v[k]) for k in _main(v)[:MOST_METRICS])}" for split, v in results.items())


def _main(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in metrics if name in KINDS or name.startswith("top")]


def _metric(name: str, value: float) -> str:
    told = kind(name)
    return f"{name} {value:.4g}{'%' if told is not None and told.unit == 'percent' else ''}"


class PlainReporter(Reporter):
    """One line per event, no control codes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last_line = 0.0
        self._said: set[str] = set()
        self._total = self._batch = 0

    def note(self, text: str) -> None:
        if text not in self._said:  # the same decision is said once
            self._said.add(text)
            self.console.print(escape(text), soft_wrap=True)

    def run_started(self, title: str, folder: Path, facts: Mapping[str, str]) -> None:
        if self.brief:
            return
        self.console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
        for name, fact in facts.items():
            self.console.print(f"  {name:<9}{escape(fact)}", soft_wrap=True)
        self.console.print(f"  {'folder':<9}{escape(str(folder))}", soft_wrap=True)

    def stage_started(self, name: str, step: int, total_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        self._total, self._batch = total_steps, batch_size
        if step:
            self.console.print(f"{name}: goes on at step {step} of {total_steps}")

    def logged(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        if time.monotonic() - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = time.monotonic()
        rate = record.get("images_per_s")
        speed = f"  {rate_text(record)}  ETA {_clock((self._total - step) * self._batch / rate)}" if rate else ""
        self.console.print(
            f"{name} step {step}/{self._total}  loss {record['loss']:.4f}  {terms_text(record)}  lr {record['lr']:.3g}{speed}",
            soft_wrap=True,
        )

    def evaluated(self, name: str, epoch: float, results: Mapping[str, Mapping[str, float]], step: int = 0) -> None:
        self.console.print(f"{name} epoch {epoch:.4g}  {metrics_text(results)}", soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class LiveReporter(PlainReporter):
    """A bar per stage: epoch, loss terms, learning rate, samples per second, memory, time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
        ]
        self.progress = Progress(*columns, console=console, refresh_per_second=4, transient=True)
        self._task: TaskID | None = None
        self._per_epoch = 1

    def stage_started(self, name: str, step: int, total_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        super().stage_started(name, step, total_steps, steps_per_epoch, batch_size)
        self._per_epoch = steps_per_epoch
        self._task = self.progress.add_task(name, total=total_steps, completed=step, detail="")

    def step_done(self, name: str, step: int) -> None:
        if self._task is not None:
            self.progress.update(self._task, completed=step)

    def logged(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        if self._task is None:
            return
        rate = f" {rate_text(record)}" if record.get("images_per_s") else ""
        memory = f" {record['memory_bytes'] / 2**30:.1f} GiB"
        detail = (
            f"epoch {step / self._per_epoch:.1f}  loss {record['loss']:.3f} ({terms_text(record)})  lr {record['lr']:.2g}{rate}{memory}"
        )
        self.progress.update(self._task, detail=escape(detail))

    def evaluated(self, name: str, epoch: float, results: Mapping[str, Mapping[str, float]], step: int = 0) -> None:
        if self._task is not None:
            self.progress.update(self._task, description=f"{name} [dim]{escape(_short(results))}[/]")

    def stage_done(self, name: str) -> None:
        if self._task is not None:
            self.progress.remove_task(self._task)
            self._task = None


def _short(results: Mapping[str, Mapping[str, float]]) -> str:
    return " ".join(f"{split} {_metric(_main(v)[0], v[_main(v)[0]])}" for split, v in results.items() if _main(v))


def rate_text(record: Mapping[str, Any]) -> str:
    """Samples per second, of texts tokens."""
    tokens = record.get("tokens_per_s")
    return f"{tokens:,.0f} tokens/s" if tokens else f"{record['images_per_s']:,.0f}/s"
