"""A stage's teacher, ready to speak: trained once by the same loop, or loaded; measured, and held against what its recipe states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from kdrun.config.check import check
from kdrun.config.compose import Composed, flatten
from kdrun.engine.build import Built, build, load_data
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import teacher_score
from kdrun.engine.optim import try_settings
from kdrun.engine.records import STUDENT_FILE, SUMMARY, must_be_writable, open_folder, read_json, write_json
from kdrun.engine.report import Reporter
from kdrun.engine.stage import StageRun, make_stage
from kdrun.engine.summary import summarise
from kdrun.errors import CheckFailed, Problem, Refused, did_you_mean
from kdrun.plan.single import StageSpec
from kdrun.strict_json import metrics_of
from kdrun.student.weights import load_weights, save_student, sha256_of
from kdrun.teacher.live import LiveTeacher


def check_stage(composed: Composed, spec: StageSpec) -> None:
    """Refuse what would stop the teacher's training, before anything is spent."""
    sub = as_composed(composed, spec)
    check(sub)
    try_settings(spec.tree["optim"])
    must_be_writable(spec.folder)


def as_composed(composed: Composed, spec: StageSpec) -> Composed:
    """A stage of its own configuration as one that can be checked and kept in a folder."""
    where = dict.fromkeys(flatten(spec.tree), "the teacher's training (teacher.fit)")
    return Composed(dict(spec.tree), where, dict(composed.choices), composed.recipe, list(composed.overrides), composed.config_dirs)


def train_teacher(
    composed: Composed, spec: StageSpec, built: Built, home: Path, device: torch.device, ranks: Ranks, reporter: Reporter
) -> dict[str, Any]:
    """Train the teacher once, or take the one that an earlier run left; load it into the built teacher."""
    assert isinstance(built.teacher, LiveTeacher)
    folder = spec.folder.resolve()
    lock = FileLock(str(folder) + ".lock")
    if ranks.first:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # a second run that wants the same teacher waits here
    try:
        ranks.barrier()
        if (folder / SUMMARY).is_file():
            reporter.note(f"teacher found: {folder}")
        else:
            resume = (folder / "checkpoints").is_dir()
            sub = as_composed(composed, spec)
            # A teacher may have seen more than its student (fit: {dataset.subset: null}).
            data = built.data if spec.tree["dataset"] == composed.tree["dataset"] else load_data(spec.tree)
            teacher_built = build(spec.tree, data, device, ranks)
            if ranks.first and not resume:
                open_folder(folder, sub)
            ranks.barrier()
            stage = make_stage(spec.tree, teacher_built, device, ranks, spec.name, reporter, folder)
            run = StageRun(spec.tree, teacher_built, stage, folder, reporter, home)
            run.begin(resume)
            run.advance()
            run.take_best()
            trained = run.exported()
            if ranks.first:
                save_student(trained, folder / STUDENT_FILE, {"config_hash": sub.hash()})
                write_json(folder / SUMMARY, {**summarise(sub, trained, run, {}, device), "folder": str(folder)})
            ranks.barrier()
    finally:
        if ranks.first:
            lock.release()
    load_weights(built.teacher.module, folder / STUDENT_FILE)
    summary = read_json(folder / SUMMARY)
    return checked_claim(composed.tree, {"from": str(folder), "sha256": sha256_of(built.teacher.module), **metrics_of(summary["test"])})


def load_teacher(tree: Mapping[str, Any], built: Built, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Load a given teacher's weights, measure it, hold it against what the recipe states. {} if there is none."""
    if built.teacher.spec is None:
        return {}
    if built.teacher.follows:
        return {"from": "the student itself, earlier or averaged"}
    source = f"the data set's own rows: {tree['teacher'].get('extra') or 'truth_logits'}"
    digest = None
    if isinstance(built.teacher, LiveTeacher):
        source = str(tree["teacher"].get("checkpoint") or "pretrained weights")
        load_checkpoint(tree, built)
        digest = sha256_of(built.teacher.module)
    measured = teacher_score(built.data, built.evaluation, built.teacher, device, ranks)
    return checked_claim(tree, {"from": source, "sha256": digest, **measured})


def load_checkpoint(tree: Mapping[str, Any], built: Built) -> None:
    """Put the weights of teacher.checkpoint, if it is set, into the built teacher. Raises `Refused` where the file or its fit is wrong."""
    node = tree["teacher"]
    if isinstance(built.teacher, LiveTeacher) and node.get("checkpoint"):
        load_weights(built.teacher.module, node["checkpoint"], node.get("rename") or (), key="teacher.checkpoint")


def checked_claim(tree: Mapping[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Raise `CheckFailed` where the measured teacher is outside the tolerance of what the recipe states."""
    claim = tree["teacher"].get("claim")
    tainted = tree["run"]["dry"] or tree["run"]["max_steps"]
    if claim and claim["metric"] not in measured:
        raise Refused(
            Problem(
                f"'{claim['metric']}' is not measured of a teacher",
                "teacher.claim.metric",
                "",
                did_you_mean(claim["metric"], {*measured} - {"from", "sha256"}),
            )
        )
    if claim and not tainted and not abs(measured[claim["metric"]] - claim["value"]) <= claim["tolerance"]:
        raise CheckFailed(
            f"the teacher scores {claim['metric']} {measured[claim['metric']]:.2f}, "
            f"the recipe states {claim['value']} within {claim['tolerance']} ({claim.get('source', '')}).\n"
            f"  teacher {measured['from']}\n"
            "  remedy  check its weights, normalisation and class order; or teacher.claim=null to go on without the check"
        )
    return measured
