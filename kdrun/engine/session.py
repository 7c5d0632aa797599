"""One run as its plan sees it: parts, teachers, training stages and kept results, each going on where a killed run left it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdrun.config.compose import Composed
from kdrun.dataset.base import Data
from kdrun.engine import state
from kdrun.engine.build import TEACHER, Built, build, build_first, start_from, start_from_teacher
from kdrun.engine.distributed import Ranks
from kdrun.engine.forecast import forecast
from kdrun.engine.optim import try_settings
from kdrun.engine.plots import plot_curves
from kdrun.engine.records import EVALUATION, STUDENT_FILE, SUMMARY, read_json, write_json
from kdrun.engine.report import Reporter
from kdrun.engine.stage import StageRun, make_stage
from kdrun.engine.summary import Result, conclude, provenance_of, summarise, teacher_line
from kdrun.engine.teaching import check_stage, load_teacher, train_teacher
from kdrun.errors import CheckFailed
from kdrun.plan.single import teacher_stage
from kdrun.student.weights import save_student, sha256_of
from kdrun.teacher.live import LiveTeacher

PROVENANCE = "provenance.json"
KEPT = "kept"  # the folder of what stages without an optimiser made


class Session:
    """Implements `kdrun.plan.base.Session`. `folder` is set when the run's folder is opened."""

    def __init__(
        self, composed: Composed, data: Data, device: torch.device, ranks: Ranks, reporter: Reporter, resume: bool, plan: Any = None
    ) -> None:
        self.composed, self.data, self.device, self.ranks, self.reporter, self.resume = composed, data, device, ranks, reporter, resume
        self.plan = plan
        self.tree = composed.tree
        self.folder = Path()
        self._first: Built | None = None
        self._teachers: dict[int, dict[str, Any]] = {}  # facts by the id of the parts
        self._stages: list[StageRun] = []
        self._began = time.perf_counter(), time.process_time()
        self._initial: dict[int, str] = {}  # checksums of students before step 0, of teachers before a stage

    def alone(self) -> Session:
        """The same run for stages that are this rank's own."""
        mine = copy.copy(self)  # the list of stages and what is known of teachers stay shared
        mine.ranks = Ranks()
        return mine

    def build(self, tree: Mapping[str, Any] | None = None, data: Data | None = None) -> Built:
        if tree is None and data is None:
            self._first = self._first or start_from(build_first(self.tree, self.data, self.device, self.ranks))
            return self._first
        built = build(tree or self.tree, data or self.data, self.device, self.ranks)
        try_settings(built.tree["optim"], built.objective.phases)
        return start_from(built)

    def check_teacher(self, built: Built) -> None:
        """Refuse what the teacher's training would refuse; load and measure a given teacher. Nothing is written."""
        spec = teacher_stage(built.tree, built.data.fingerprint)
        if spec is not None:
            check_stage(self.composed, spec)
        else:
            self._teachers[id(built)] = load_teacher(built.tree, built, self.device, self.ranks)

    def ready_teacher(self, built: Built) -> dict[str, Any]:
        if id(built) not in self._teachers:
            spec = teacher_stage(built.tree, built.data.fingerprint)
            self._teachers[id(built)] = (
                load_teacher(built.tree, built, self.device, self.ranks)
                if spec is None
                else train_teacher(self.composed, spec, built, self.folder, self.device, self.ranks, self.reporter)
            )
        if built.tree["plan"].get("start_from") == TEACHER:
            start_from_teacher(built)
        facts = self._teachers[id(built)]
        if facts:
            self.reporter.note(teacher_line(facts, built.evaluation.primary))
        return facts

    def prepare(self, name: str | None, built: Built, tree: Mapping[str, Any] | None = None) -> StageRun:
        folder = self.folder if name is None else self.folder / name
        self._initial[id(built)] = sha256_of(built.network)
        if isinstance(built.teacher, LiveTeacher):
            self._initial[id(built.teacher)] = sha256_of(built.teacher.module)
        stage = make_stage(tree or built.tree, built, self.device, self.ranks, (name or "student").replace("/", " "), self.reporter, folder)
        if self.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            if name is None:
                self._write_provenance(built)
        self.ranks.barrier()
        run = StageRun(tree or built.tree, built, stage, folder, self.reporter, self.folder)
        self._stages.append(run)
        run.begin(self.resume and (name is None or (folder / "checkpoints").is_dir()))
        return run

    def train(self, name: str | None, built: Built, tree: Mapping[str, Any] | None = None) -> StageRun:
        run = self.prepare(name, built, tree)
        if name is None:
            self._foretell(run)
        run.advance()
        self.check_untouched(built)
        return run

    def _foretell(self, run: StageRun) -> None:
        """Write down what the run is expected to cost, before it costs anything."""
        run.forecast = forecast(run.tree, run.built, run.stage)
        file = self.folder / PROVENANCE
        if self.ranks.first and run.forecast is not None:
            write_json(file, {**read_json(file), "predicted": run.forecast.predicted})

    def _foretold(self, run: StageRun) -> dict[str, Any]:
        """What the run was expected to cost, beside what it did; of one that was finished before, as its record says."""
        if run.forecast is not None:
            return run.forecast.record(run.stage, run.spent()[0])
        before = read_json(self.folder / SUMMARY) if (self.folder / SUMMARY).is_file() else {}
        return {key: before[key] for key in ("predicted", "actual") if key in before}

    def check_untouched(self, built: Built) -> None:
        """Law 6."""
        if isinstance(built.teacher, LiveTeacher) and sha256_of(built.teacher.module) != self._initial[id(built.teacher)]:
            raise CheckFailed("the teacher's weights or buffers changed during the run; it is not recorded")

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        folder = self.folder / KEPT / name
        found = state.newest(folder) if self.resume else None
        if found is not None:
            return found[1]
        made = make()
        if self.ranks.first:
            state.save(folder, 0, made, keep=1)
        self.ranks.barrier()
        return made

    def finish(self, training: StageRun, metrics: Mapping[str, float] | None = None, facts: Mapping[str, Any] | None = None) -> Result:
        built = training.built
        training.take_best()
        detail = training.evaluator.breakdown(training.network(), "test") if "test" in built.data.splits else {}
        student = training.exported()
        summary = summarise(self.composed, student, training, self._known(built), self.device, metrics or {}, self._spent())
        summary |= {**(facts or {}), "folder": str(self.folder)}
        summary |= self._foretold(training)
        if self.ranks.first:
            if not (self.folder / PROVENANCE).is_file():
                self._write_provenance(built)
            save_student(student, self.folder / STUDENT_FILE, {"recipe": str(self.composed.recipe), "config_hash": self.composed.hash()})
            plot_curves(training.folder)
            if detail:
                write_json(self.folder / EVALUATION, detail)
            built.evaluation.picture(self.folder, student, built.teacher, built.data, self.device)
            write_json(self.folder / SUMMARY, summary)
            self.reporter.run_done(summary)
        self.ranks.barrier()
        return Result(self.folder, summary)

    def conclude(self, built: Built, metrics: Mapping[str, float], facts: Mapping[str, Any] | None = None) -> Result:
        """The summary of a plan that trains nothing: no student is written. `metrics` holds the evaluation's primary one."""
        spent = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        summary = conclude(self.composed, built.evaluation, metrics, spent, self.device) | {**(facts or {}), "folder": str(self.folder)}
        if self.ranks.first:
            self._write_provenance(built)
            write_json(self.folder / SUMMARY, summary)
            self.reporter.run_done(summary)
        self.ranks.barrier()
        return Result(self.folder, summary)

    def _spent(self) -> tuple[float, float]:
        """(seconds, CPU seconds) of all stages of the run."""
        each = [stage.spent() for stage in self._stages]
        return sum(s for s, _ in each), sum(c for _, c in each)

    def _known(self, built: Built) -> dict[str, Any]:
        """Facts of the stage's teacher, or, where it has none of its own, of the run's."""
        return self._teachers.get(id(built)) or self._teachers.get(id(self._first), {})

    def _write_provenance(self, built: Built) -> None:
        initial = self._initial.get(id(built), "")
        write_json(self.folder / PROVENANCE, provenance_of(self.composed, built, self._known(built), initial, self.device, self.ranks))
