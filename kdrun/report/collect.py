"""The runs below the folders that are named, with everything that each of them has written. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdrun.config.compose import Composed
from kdrun.engine.records import DIAGNOSTICS, EVALUATION, LOCK, METRICS, ORIGIN, SUMMARY, load_run
from kdrun.errors import Problem, Refused

ARMS, SWEEP, PROVENANCE, NOT_FINITE = "arms", "sweep.json", "provenance.json", "not_finite.json"
NO_RUNS = ("teachers", "ledger")  # folders below outputs/ that hold other things


@dataclass(frozen=True, eq=False)
class Run:
    """One run's folder. `arm` is what its comparison or sweep calls it, None for a run by itself."""

    folder: Path
    arm: str | None
    composed: Composed
    of_sweep: bool = False

    @property
    def tree(self) -> Mapping[str, Any]:
        return self.composed.tree

    @property
    def seed(self) -> int:
        return int(self.tree["seed"])

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        return _document(self.folder / SUMMARY)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return _document(self.folder / PROVENANCE) or {}

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        return _document(self.folder / EVALUATION) or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Of the run's own stage; of a plan of several stages, the last of them that trained."""
        return self._logged(METRICS)

    @cached_property
    def diagnostics(self) -> list[dict[str, Any]]:
        return self._logged(DIAGNOSTICS)

    def _logged(self, name: str) -> list[dict[str, Any]]:
        own = self.folder / name
        files = [own] if own.is_file() else sorted(self.folder.glob(f"*/**/{name}"), key=lambda file: (file.stat().st_mtime, str(file)))
        return list(_lines(files[-1])) if files else []

    @property
    def state(self) -> str:
        """In words."""
        if self.summary is not None:
            tainted = self.summary.get("tainted")
            return f"done, but tainted ({', '.join(tainted)})" if tainted else "done"
        broken = _document(self.folder / NOT_FINITE)
        if broken is not None:
            return f"ended at step {broken.get('step', '?')}: not finite"
        last = max((line.get("epoch") or 0 for line in self.metrics), default=None)
        far = "nothing logged yet" if last is None else f"epoch {last:.4g} of {self._planned()}"
        held = ", a process works in it or was killed" if (self.folder / LOCK).exists() else ""
        return f"not finished: {far}{held}"

    def _planned(self) -> str:
        optim = self.tree["optim"]
        return f"{optim['epochs']:.4g}" if not optim.get("steps") else f"those that make {optim['steps']} steps"


@dataclass(frozen=True)
class Found:
    """Runs in the order of their folders, and what finished comparisons say of themselves."""

    runs: list[Run]
    comparisons: list[dict[str, Any]]


def find(folders: Sequence[Path], root: Path = Path("outputs")) -> Found:
    """Runs of the named folders, each once; without any, all below `root`. Raises `Refused` for a folder that holds none."""
    runs: dict[Path, Run] = {}
    comparisons: dict[Path, dict[str, Any]] = {}
    empty = []
    for folder in folders or [root]:
        there = list(_runs(folder, comparisons)) if folder.is_dir() else []
        runs |= {run.folder.resolve(): run for run in there if run.folder.resolve() not in runs}
        if not there:
            what = "holds no run" if folder.is_dir() else "is not there"
            remedy = "a folder of a run, a comparison or a sweep; `kdrun ls runs` lists them; `kdrun train` makes one"
            empty.append(Problem(f"this folder {what}", "", str(folder), remedy))
    if empty:
        raise Refused(empty)
    return Found(list(runs.values()), list(comparisons.values()))


def _runs(folder: Path, comparisons: dict[Path, dict[str, Any]]) -> Iterator[Run]:
    """Of a sweep, a comparison, a run, or of all that a folder holds."""
    if (folder / SWEEP).is_file():
        for job in (_document(folder / SWEEP) or {}).get("jobs", []):
            if (folder / job["folder"] / ORIGIN).is_file():
                yield Run(folder / job["folder"], _words(job["choices"]), load_run(folder / job["folder"]), of_sweep=True)
    elif (folder / ARMS).is_dir():
        told = _document(folder / SUMMARY)
        if told is not None and "arms" in told:
            comparisons[folder.resolve()] = told
        for origin in sorted((folder / ARMS).glob(f"*/*/{ORIGIN}")):
            yield Run(origin.parent, origin.parent.parent.name, load_run(origin.parent))
    elif (folder / ORIGIN).is_file():
        arm = folder.parent.name if folder.parent.parent.name == ARMS else None
        yield Run(folder, arm, load_run(folder))
    else:
        for below in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in NO_RUNS and not p.name.startswith(".")):
            yield from _runs_below(below, comparisons)


def _runs_below(folder: Path, comparisons: dict[Path, dict[str, Any]], depth: int = 2) -> Iterator[Run]:
    if any((folder / name).exists() for name in (SWEEP, ARMS, ORIGIN)):
        yield from _runs(folder, comparisons)
    elif depth:
        for below in sorted(p for p in folder.iterdir() if p.is_dir()):
            yield from _runs_below(below, comparisons, depth - 1)


def _words(choices: Mapping[str, Any]) -> str:
    """What a sweep's job is called beside other seeds of the same."""
    named = ("objective", "recipe", "student", "teacher")
    return ", ".join(str(v) if k in named else f"{k}={v}" for k, v in choices.items() if k != "seed") or "the only setting"


def _document(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written yet, or by a process that was killed over it
        return None
    return found if isinstance(found, dict) else None


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; a process that was killed may have left half a last one."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
