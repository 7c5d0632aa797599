"""The cost of a whole command: every arm and every seed that it asks for, and the teachers that must be trained first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdrun.config.check import instantiate
from kdrun.config.compose import Composed
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data
from kdrun.engine.build import Built, build_first, load_data
from kdrun.engine.compare import arm_names, jobs, method_name
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import SUMMARY
from kdrun.engine.standin import stand_in
from kdrun.engine.workload import Work, teacher_work, work_of
from kdrun.evaluation import cost
from kdrun.plan.single import teacher_stage
from kdrun.teacher.live import LiveTeacher


def costs_of(composed: Composed, built: Built, data: Data, work: Work, rate: float | None) -> dict[str, Any]:
    """`runs`, `arms`, FLOPs of each arm for one seed and of the teachers; with `rate` (seconds of a training sample) also `seconds`.

    Only of plans whose first stage is all there is. Raises `Refused` for an arm that the command would refuse.
    """
    run = composed.tree["run"]
    seeds = run["seeds"] or [composed.tree["seed"]]
    names = arm_names(composed)
    found: dict[str, Any] = {"arms": names, "seeds": len(seeds), "runs": len(seeds) * len(names)}
    plan = instantiate(composed.tree["plan"], "plan", allowed(composed.tree))
    if not getattr(plan, "train", True) or plan.describe():
        return found
    arms, teachers = {method_name(composed): work}, _teacher(composed.tree, built)
    if len(names) > 1:
        once = replace(composed, tree={**composed.tree, "run": {**run, "seeds": [seeds[0]]}})
        for job in jobs(once, Path())[1:]:
            other = _built(job.composed, composed, data)
            arms[job.arm] = work_of(job.composed.tree, other)
            teachers |= _teacher(job.composed.tree, other)
    found["arm_flops"] = {arm: done.total for arm, done in arms.items()}
    found["teacher_flops"] = sum(done.total for done in teachers.values())
    if rate is not None:
        a_flop = rate / max(1, work.sample)
        seed = a_flop * sum(found["arm_flops"].values())
        first = a_flop * found["teacher_flops"]
        found["seconds"] = {"run": a_flop * work.total, "seed": seed, "teacher": first, "all": len(seeds) * seed + first}
    return found


def without_weights(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Weights cost no time here and may need a network; the outside of a model is the same without them."""
    bare_nodes = {
        who: {**tree[who], **{key: False for key in ("pretrained", "pretrained_backbone") if key in tree[who]}}
        for who in ("teacher", "student")
    }
    return {**tree, **bare_nodes}


def _built(arm: Composed, composed: Composed, data: Data) -> Built:
    """An arm on shapes without content."""
    tree = without_weights(arm.tree)
    same = arm.tree["dataset"] == composed.tree["dataset"]
    own = data if same else stand_in(tree["dataset"], allowed(tree)) or load_data(tree)
    return build_first(tree, own, torch.device("cpu"), Ranks(), FakeTensorMode(allow_non_fake_inputs=True))


def _teacher(tree: Mapping[str, Any], built: Built) -> dict[Path, Work]:
    """The training that the teacher of a run needs, by the folder in which it is kept: none where it is there already."""
    spec = teacher_stage(tree, built.data.fingerprint)
    if spec is None or (spec.folder / SUMMARY).is_file() or not isinstance(built.teacher, LiveTeacher) or built.teacher.spec is None:
        return {}
    flops = cost.flops(built.teacher.network, built.teacher.spec.input_shape)
    return {spec.folder: teacher_work(spec, built, flops)}


def facts_of(document: Mapping[str, Any], composed: Composed, samples: int) -> dict[str, str]:
    """The estimate in words."""
    steps, per_epoch, batch = document["total_steps"], document["steps_per_epoch"], document["batch"]
    found = {"schedule": f"{steps / per_epoch:.4g} epochs of {per_epoch} steps of {batch} samples: {steps:,} steps"}
    plan = instantiate(composed.tree["plan"], "plan", allowed(composed.tree))
    if not getattr(plan, "train", True):
        return {"plan": plan.describe()}
    if plan.describe():
        found["plan"] = f"{plan.describe()}; the figures here are of the first stage"
    if document["teacher_is_trained_first"]:
        kept = document.get("teacher_flops") == 0
        first = "it was trained by an earlier run and is kept" if kept else "it is trained first by the same loop (once, then kept)"
        found["teacher"] = f"has no checkpoint: {first}"
    if "memory_bytes" in document:
        found["memory"] = _memory(document)
    share = 100 * document["evaluation_flops"] / max(1, document["flops"] + document["evaluation_flops"])
    found["compute"] = (
        f"{document['flops'] + document['evaluation_flops']:.2g} FLOPs in all: three forward passes' worth of the student, one of the "
        f"teacher; {share:.0f} % of it is evaluation"
    )
    if "seconds_per_sample" in document:
        spent = document["seconds"]["run"] if "seconds" in document else document["seconds_per_sample"] * samples * steps / per_epoch
        tried = f"probed with {document['probe_samples']} samples a step"
        found["time"] = f"{duration(spent)} for the student on {document['machine']} ({tried})"
    if document["runs"] > 1:
        found["runs"] = f"{document['runs']} ({len(document['arms'])} arms, {document['seeds']} seeds)"
    if "seconds" in document and (document["runs"] > 1 or document["seconds"]["teacher"]):
        first = document["seconds"]["teacher"]
        trained = f", {duration(first)} of it the teacher's own training" if first else ""
        found["in all"] = f"{duration(document['seconds']['all'])}{trained} (other arms and the teacher by their FLOPs)"
    return found


def _memory(document: Mapping[str, Any]) -> str:
    parts = document["memory_bytes"]
    shown = ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items() if size)
    tried = f"; micro-batch of {document['micro_batch']}), beside torch itself and the data"
    tried = tried if "activations" in parts else "), beside activations, which are not tried at this size"
    return f"{mebibytes(sum(parts.values()))} MiB ({shown}{tried}"


def mebibytes(size: float) -> str:
    """Two digits where they are few."""
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.2g}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
