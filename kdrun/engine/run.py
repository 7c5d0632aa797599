"""From a composed configuration to a finished run folder: refuse, prepare the teacher, train, measure, record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from kdrun.config.check import check
from kdrun.config.compose import Composed, flatten
from kdrun.dataset.base import Data
from kdrun.engine import provenance
from kdrun.engine.build import Built, build, load_data, open_source
from kdrun.engine.device import peak_memory_bytes, pick_device, set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import teacher_score
from kdrun.engine.optim import try_settings
from kdrun.engine.plots import plot_curves
from kdrun.engine.records import SUMMARY, must_be_writable, open_folder, read_json, run_folder, write_json
from kdrun.engine.report import Reporter
from kdrun.engine.stage import StageRun, Stopped, make_stage
from kdrun.errors import CheckFailed, Problem, Refused, did_you_mean
from kdrun.evaluation import cost
from kdrun.evaluation.protocol import reported
from kdrun.plan.single import StageSpec, teacher_stage
from kdrun.student.weights import load_weights, save_student, sha256_of
from kdrun.teacher.live import LiveTeacher

STUDENT_FILE = "student.safetensors"


@dataclass(frozen=True)
class Result:
    """What a finished run says of itself."""

    folder: Path
    summary: dict[str, Any]


def execute(
    composed: Composed,
    reporter: Reporter,
    folder: Path | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    data: Data | None = None,
) -> Result:
    """Run one configuration to its end. Raises `Refused` before anything is written, `CheckFailed` if the teacher is not
    what it is said to be, `Stopped` after a signal, `NotFinite` before a bad update."""
    tree, ranks = composed.tree, ranks or Ranks()
    device = pick_device(tree["hardware"], ranks.local_rank)
    set_up(tree["hardware"], device)
    data = data or load_data(tree)
    built = build(tree, data, device, ranks)
    open_source(tree, data, device, ranks)  # it has its own reasons to refuse
    try_settings(tree["optim"])
    start_from(tree, built)
    trained_by = teacher_stage(tree, data.fingerprint)
    teacher_facts: dict[str, Any] = {}
    if trained_by is None:
        teacher_facts = load_teacher(tree, built, device, ranks)
    else:
        check(as_composed(composed, trained_by))
        try_settings(trained_by.tree["optim"])
        must_be_writable(trained_by.folder)
    folder = folder or run_folder(composed)
    if ranks.first and not resume:
        open_folder(folder, composed)
    ranks.barrier()
    reporter.run_started(title(composed), folder, facts(composed, built, device))
    if trained_by is not None:
        teacher_facts = train_teacher(composed, trained_by, built, folder, device, ranks, reporter)
    if teacher_facts:
        reporter.note(teacher_line(teacher_facts, built.evaluation.primary))
    return train_student(composed, built, teacher_facts, folder, resume, device, ranks, reporter)


def train_student(
    composed: Composed,
    built: Built,
    teacher_facts: dict[str, Any],
    folder: Path,
    resume: bool,
    device: torch.device,
    ranks: Ranks,
    reporter: Reporter,
) -> Result:
    tree = composed.tree
    before = sha256_of(built.teacher.module) if isinstance(built.teacher, LiveTeacher) else None
    initial = sha256_of(built.network)
    stage = make_stage(tree, built, device, ranks, "student", reporter)
    run = StageRun(tree, built, stage, folder, reporter)
    if ranks.first:
        write_json(folder / "provenance.json", provenance_of(composed, built, teacher_facts, initial, device, ranks))
    run.run(resume)
    if isinstance(built.teacher, LiveTeacher) and sha256_of(built.teacher.module) != before:
        raise CheckFailed("the teacher's weights or buffers changed during the run; it is not recorded")
    student = run.exported()
    summary = summarise(composed, student, run, teacher_facts, device)
    if ranks.first:
        save_student(student, folder / STUDENT_FILE, {"recipe": str(composed.recipe), "config_hash": composed.hash()})
        write_json(folder / SUMMARY, summary)
        plot_curves(folder)
    ranks.barrier()
    return Result(folder, summary)


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
            stage = make_stage(spec.tree, teacher_built, device, ranks, spec.name, reporter)
            run = StageRun(spec.tree, teacher_built, stage, folder, reporter, home)
            run.run(resume)
            trained = run.exported()
            if ranks.first:
                save_student(trained, folder / STUDENT_FILE, {"config_hash": sub.hash()})
                write_json(folder / SUMMARY, summarise(sub, trained, run, {}, device))
            ranks.barrier()
    finally:
        if ranks.first:
            lock.release()
    load_weights(built.teacher.module, folder / STUDENT_FILE)
    summary = read_json(folder / SUMMARY)
    return checked_claim(composed.tree, {"from": str(folder), "sha256": sha256_of(built.teacher.module), **summary["test"]})


def load_teacher(tree: Mapping[str, Any], built: Built, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Load a given teacher's weights, measure it, hold it against what the recipe states. {} if there is none."""
    if built.teacher.spec is None:
        return {}
    source = "the data set's posterior"
    digest = None
    if isinstance(built.teacher, LiveTeacher):
        source = str(tree["teacher"].get("checkpoint") or "pretrained weights")
        if tree["teacher"].get("checkpoint"):
            load_weights(built.teacher.module, source, tree["teacher"].get("rename") or (), key="teacher.checkpoint")
        digest = sha256_of(built.teacher.module)
    measured = teacher_score(built.data, built.evaluation, built.teacher, device, ranks)
    return checked_claim(tree, {"from": source, "sha256": digest, **measured})


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


def start_from(tree: Mapping[str, Any], built: Built) -> None:
    """A new run that begins with another run's student (not a resume: optimiser and data start anew)."""
    wanted = tree["plan"].get("start_from")
    if wanted:
        path = Path(wanted)
        load_weights(built.network, path / STUDENT_FILE if path.is_dir() else path)


def taints(composed: Composed) -> list[str]:
    """Why this run may never enter the ledger. A subset that the recipe itself states is part of its experiment."""
    run = composed.tree["run"]
    found = [f"run.{key}={run[key]}" for key in ("dry", "max_steps") if run[key]]
    found += [f"dataset.{key} from the command line" for key in ("subset", "subset_test") if composed.set_by_user(f"dataset.{key}")]
    return found


def summarise(
    composed: Composed, student: nn.Module, run: StageRun, teacher_facts: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """The run in one object: the number by its protocol, all metrics, what it cost."""
    evaluation, last = run.built.evaluation, run.history[-1]
    value, how = reported(run.history, evaluation.protocol, evaluation.primary, evaluation.last_k)
    return {
        "recipe": composed.recipe,
        "folder": str(run.folder),
        "choices": composed.choices,
        "seed": composed.tree["seed"],
        "config_hash": composed.hash(),
        "metric": evaluation.primary,
        "value": value,
        "protocol": evaluation.protocol,
        "how": how,
        "test": last["test"],
        "validation": last["validation"],
        "test_reads": run.evaluator.reads.get("test", 0),
        "teacher": dict(teacher_facts),
        "tainted": taints(composed),
        "steps": run.stage.step,
        "epochs": run.stage.step / run.built.steps_per_epoch,
        "cost": {
            "seconds": run.spent()[0],
            "cpu_seconds": run.spent()[1],
            "images_per_s": run.rate,
            "peak_memory_bytes": peak_memory_bytes(device),
            "hardware": provenance.hardware(device),
        },
        "student": cost_of(student, run.built.data.input_shape, evaluation.latency),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def cost_of(network: nn.Module, input_shape: tuple[int, ...], latency: bool) -> dict[str, Any]:
    """Parameters, FLOPs of one sample and, if asked for, milliseconds of one sample on this machine."""
    found: dict[str, Any] = {"parameters": cost.parameters(network), "flops": cost.flops(network, input_shape)}
    return found | (cost.latency(network, input_shape) if latency else {})


def provenance_of(
    composed: Composed, built: Built, teacher_facts: Mapping[str, Any], initial: str, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    data = built.data
    sizes = {name: len(split) for name, split in data.splits.items()}
    return {
        "code": provenance.code(),
        "config_hash": composed.hash(),
        "overrides": composed.overrides,
        "origins": composed.origins,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "sizes": sizes},
        "teacher": dict(teacher_facts),
        "seed": composed.tree["seed"],
        "initial_student_sha256": initial,
        "ranks": ranks.world,
        "environment": provenance.environment(device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def title(composed: Composed) -> str:
    chosen = composed.choices
    return f"{composed.recipe or 'run'}: {chosen['objective']}, {chosen['teacher']} -> {chosen['student']}"


def facts(composed: Composed, built: Built, device: torch.device) -> dict[str, str]:
    data, optim = built.data, composed.tree["optim"]
    sizes = ", ".join(f"{len(s)} {n}" for n, s in data.splits.items())
    return {
        "data": f"{data.name}: {sizes}; {data.classes} classes",
        "student": f"{cost.parameters(built.network):,} parameters",
        "schedule": f"{optim['epochs']:g} epochs, {built.total_steps} steps, {optim['name']}, lr {optim['lr']}",
        "seed": str(composed.tree["seed"]),
        "on": provenance.hardware(device),
    }


def teacher_line(teacher: Mapping[str, Any], metric: str) -> str:
    measured = f" measured here: {metric} {teacher[metric]:.2f}" if metric in teacher else ""
    return f"teacher{measured} ({teacher['from']})"


__all__ = ["CheckFailed", "Problem", "Refused", "Result", "Stopped", "execute"]
