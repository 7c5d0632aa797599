"""What a finished run says of itself: its numbers, what they cost, and where they come from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdrun.config.compose import Composed
from kdrun.engine import provenance
from kdrun.engine.build import Built
from kdrun.engine.device import peak_memory_bytes
from kdrun.engine.distributed import Ranks
from kdrun.engine.stage import StageRun
from kdrun.evaluation import cost
from kdrun.evaluation.protocol import reported
from kdrun.teacher.cached import CachedTeacher

OF_THE_PLAN = "of the whole plan"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]


def taints(composed: Composed) -> list[str]:
    """Why this run may never enter the ledger. A subset that the recipe itself states is part of its experiment."""
    run = composed.tree["run"]
    found = [f"run.{key}={run[key]}" for key in ("dry", "max_steps") if run[key]]
    found += [f"dataset.{key} from the command line" for key in ("subset", "subset_test") if composed.set_by_user(f"dataset.{key}")]
    return found


def summarise(
    composed: Composed,
    student: nn.Module,
    run: StageRun,
    teacher_facts: Mapping[str, Any],
    device: torch.device,
    metrics: Mapping[str, float] | None = None,
    spent: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The run in one object: the number by its protocol, all metrics, what it cost.

    `metrics` are a plan's own and count before those of its last stage; `spent` is (seconds, CPU seconds) of all its stages.
    """
    evaluation, shown = run.built.evaluation, shown_epoch(run)
    value, how = reported(run.history, evaluation.protocol, evaluation.primary, evaluation.last_k, evaluation.ties)
    metrics, written = metrics or {}, run.written()
    if evaluation.primary in metrics:
        value, how = metrics[evaluation.primary], OF_THE_PLAN
    return {
        **identity(composed, evaluation, value, how),
        "test": {**(shown["test"] or {}), **metrics},
        "validation": shown["validation"],
        "test_reads": run.evaluator.reads.get("test", 0),
        "teacher": dict(teacher_facts),
        "steps": run.stage.step,
        "epochs": run.stage.step / run.built.steps_per_epoch,
        "cost": {**cost_in_time(spent or run.spent(), device), **run.speed()},
        **({"written": written} if written else {}),
        **({"cache": run.stage.teacher.report()} if isinstance(run.stage.teacher, CachedTeacher) else {}),
        "student": cost_of(student, run.built.data.input_shape, evaluation.latency),
    }


def conclude(
    composed: Composed, evaluation: Any, metrics: Mapping[str, float], spent: tuple[float, float], device: torch.device
) -> dict[str, Any]:
    """The same of a plan that trained nothing: its metrics are all there is."""
    return {
        **identity(composed, evaluation, metrics[evaluation.primary], OF_THE_PLAN),
        "test": dict(metrics),
        "validation": None,
        "test_reads": 0,
        "teacher": {},
        "steps": 0,
        "epochs": 0.0,
        "cost": {**cost_in_time(spent, device), "images_per_s": None},
        "student": {},
    }


def identity(composed: Composed, evaluation: Any, value: float, how: str) -> dict[str, Any]:
    """Which run, and its number."""
    return {
        "recipe": composed.recipe,
        "folder": "",
        "choices": composed.choices,
        "seed": composed.tree["seed"],
        "config_hash": composed.hash(),
        "metric": evaluation.primary,
        "value": value,
        "protocol": evaluation.protocol,
        "how": how,
        "tainted": taints(composed),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def cost_in_time(spent: tuple[float, float], device: torch.device) -> dict[str, Any]:
    memory, hardware = peak_memory_bytes(device), provenance.hardware(device)
    return {"seconds": spent[0], "cpu_seconds": spent[1], "peak_memory_bytes": memory, "hardware": hardware}


def shown_epoch(run: StageRun) -> dict[str, Any]:
    """The evaluation whose other metrics stand beside the reported number: that of the exported weights."""
    if run.best is None:
        return run.history[-1]
    return next(entry for entry in run.history if entry["step"] == run.best["step"])


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


def teacher_line(teacher: Mapping[str, Any], metric: str) -> str:
    measured = f" measured here: {metric} {teacher[metric]:.2f}" if metric in teacher else ""
    return f"teacher{measured} ({teacher['from']})"
