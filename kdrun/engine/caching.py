"""The cache of a stage's teacher: what does not fit, what it will cost, and the teacher that reads and fills it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensor

from kdrun.cache import wanted
from kdrun.cache.manifest import must_match, open_folder
from kdrun.cache.store import Store, fields
from kdrun.config.targets import allowed, component
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import TokenSplit
from kdrun.engine.distributed import Ranks
from kdrun.engine.report import Reporter
from kdrun.errors import Problem, Refused
from kdrun.objective.base import Objective
from kdrun.strict_json import to_json
from kdrun.student.weights import load_weights
from kdrun.teacher.cached import CachedTeacher
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Teacher

if TYPE_CHECKING:
    from kdrun.engine.build import Built

FOLDER = "cache"  # under run.root


def cache_problems(tree: Mapping[str, Any], data: Data, objective: Objective, teacher: Teacher) -> list[Problem]:
    """Why what the teacher says cannot be kept as the configuration wants."""
    if not wanted.wanted(tree):
        return []
    source = component(tree["source"]["_target_"], allowed(tree), "source")
    needs = objective.needs()
    found = wanted.problems(tree, data, objective, needs, teacher, source, epochs_of(tree, data))
    if not found and tree["cache"]["path"] and wanted.heard(needs) and isinstance(teacher, LiveTeacher):
        made_of = wanted.made_of(tree, data, wanted.format_of(tree, data, objective, needs, teacher), teacher, loaded=False)
        try:
            # The weights are not in place yet, and a plan has another shape of the network than its hub name has.
            must_match(folder_of(tree, data, made_of), made_of, leave_out=("teacher", "network"))
        except Refused as refused:
            found = refused.problems
    return found


def epochs_of(tree: Mapping[str, Any], data: Data) -> float:
    """How often the rows of a split are walked through."""
    steps = tree["optim"].get("steps")
    if not steps:
        return float(tree["optim"]["epochs"])
    return float(steps * int(tree["source"].get("batch_size") or len(data.split("train"))) / len(data.split("train")))


def cached(tree: Mapping[str, Any], built: Built, ranks: Ranks, reporter: Reporter) -> Teacher:
    """The teacher of the training rows: the built one, or that with its cache. Its weights must be in place.

    Raises `Refused` where the cache that is named was made of something else.
    """
    live, needs = built.teacher, built.objective.needs()
    if not wanted.wanted(tree) or not isinstance(live, LiveTeacher):
        return live
    if not wanted.heard(needs):
        reporter.note(f"teacher cache: not used, {type(built.objective).__name__} does not listen to the teacher")
        return live
    data, split = built.data, built.data.split("train")
    form = wanted.format_of(tree, data, built.objective, needs, live)
    made_of = wanted.made_of(tree, data, form, live)
    folder = folder_of(tree, data, made_of)
    counts = wanted.counts(split)
    if ranks.first:
        if tree["cache"]["path"]:
            must_match(folder, made_of)
        else:
            home = {**tree, "run": {**tree["run"], "root": str(Path(tree["run"]["root"]).resolve())}}
            layout = {"record": fields(form.record), "samples": len(split), **({"counts": counts.tolist()} if (counts != 1).any() else {})}
            open_folder(folder, made_of, {**layout, "tree": home})
    ranks.barrier()
    store = Store(folder, form.record, counts)
    redrawn = wanted.Redrawn.of(tree, split)
    teacher = CachedTeacher(live, store, form, redrawn, split.ids, data.total_ids, isinstance(split, TokenSplit))
    reporter.note(described(tree, data, store, teacher))
    return teacher


def folder_of(tree: Mapping[str, Any], data: Data, made_of: Mapping[str, Any]) -> Path:
    """Named by content: every run that asks the same teacher about the same views finds the same one."""
    if tree["cache"]["path"]:
        return Path(tree["cache"]["path"]).expanduser().resolve()
    name = f"{data.name}-{str(tree['teacher']['_target_']).rpartition('.')[2]}-{hashlib.sha256(to_json(made_of).encode()).hexdigest()[:12]}"
    return (Path(tree["run"]["root"]) / FOLDER / name).resolve()


def described(tree: Mapping[str, Any], data: Data, store: Store, teacher: CachedTeacher) -> str:
    """The plan in words: where, how large, how much of it is there."""
    epochs = epochs_of(tree, data)
    there = filled_share(tree, data, store, epochs)
    if there == 1:
        number = wanted.views(tree, data, epochs)
        return f"teacher cache: {teacher.form}, all {number} views are there, the teacher is not asked ({store.folder})"
    return f"{_size(teacher.form, tree, data, epochs)}; {100 * there:.0f} % of it is there ({store.folder})"


def cache_facts(tree: Mapping[str, Any], built: Built) -> dict[str, str]:
    """The line of `kdrun plan`."""
    if not wanted.wanted(tree) or not isinstance(built.teacher, LiveTeacher) or not wanted.heard(built.objective.needs()):
        return {}
    form = wanted.format_of(tree, built.data, built.objective, built.objective.needs(), built.teacher)
    epochs = epochs_of(tree, built.data)
    store = _kept(tree, built, form)
    share = 0.0 if store is None else filled_share(tree, built.data, store, epochs)
    there = "all of its rows are there: the teacher is not asked" if share == 1 else f"{100 * share:.0f} % of its rows are there"
    return {"cache": _size(form, tree, built.data, epochs) + (f"; {there}" if share else "")}


def predicted_bytes(tree: Mapping[str, Any], built: Built) -> int | None:
    """Of the cache that a run will read and fill, on disk when it is full; None where there is none."""
    needs = built.objective.needs()
    if not wanted.wanted(tree) or not isinstance(built.teacher, LiveTeacher) or not wanted.heard(needs):
        return None
    form = wanted.format_of(tree, built.data, built.objective, needs, built.teacher)
    return wanted.total_bytes(form, tree, built.data, epochs_of(tree, built.data))


def filled_share(tree: Mapping[str, Any], data: Data, store: Store, epochs: float) -> float:
    """How much of what a run asks for is there."""
    number = wanted.views(tree, data, epochs)
    return sum(int(store.filled(view).sum()) for view in range(number)) / (number * len(store.counts))


def _kept(tree: Mapping[str, Any], built: Built, form: Any) -> Store | None:
    """The cache that a run would use, of which nothing may be there; None where its name (the teacher's weights) is not known yet."""
    from kdrun.engine.records import STUDENT_FILE
    from kdrun.plan.single import teacher_stage

    teacher, data = built.teacher, built.data
    if not isinstance(teacher, LiveTeacher) or any(isinstance(p, FakeTensor) for p in teacher.module.parameters()):
        return None
    counts = wanted.counts(data.split("train"))
    if tree["cache"]["path"]:
        return Store(folder_of(tree, data, {}), form.record, counts)
    spec = teacher_stage(tree, data.fingerprint)
    file = tree["teacher"].get("checkpoint") if spec is None else spec.folder / STUDENT_FILE
    if not file or not Path(file).is_file():
        return None
    load_weights(teacher.module, file, (tree["teacher"].get("rename") or ()) if spec is None else (), key="teacher.checkpoint")
    return Store(folder_of(tree, data, wanted.made_of(tree, data, form, teacher)), form.record, counts)


def _size(form: Any, tree: Mapping[str, Any], data: Data, epochs: float) -> str:
    number, items = wanted.views(tree, data, epochs), int(wanted.counts(data.split("train")).sum())
    size = form.record.itemsize * items * number
    what = "tokens" if data.vocabulary is not None else "samples"
    pays = "the second run with this teacher, data and seed" if number >= epochs else f"epoch {number + 1} of {epochs:g}"
    plural = "s" * (number != 1)
    return f"teacher cache: {form}, {number} view{plural} of {items:,} {what}, {size / 1e6:,.1f} MB; the teacher is saved from {pays} on"
