"""From a configuration tree to objects that fit each other, or to a refusal that names everything that does not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdrun import rng
from kdrun.config.check import instantiate
from kdrun.config.schema import STUDENT_KEYS, TEACHER_KEYS
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data
from kdrun.engine.beside import beside_problems
from kdrun.engine.caching import cache_problems
from kdrun.engine.device import channels_last, placement_problems
from kdrun.engine.distributed import Ranks
from kdrun.engine.learner import Learner
from kdrun.engine.mixing import mixing_problems
from kdrun.engine.records import STUDENT_FILE
from kdrun.engine.texts import context_problems, packing_problems, text_problems
from kdrun.engine.writing import writing_problems
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.objective.base import Objective
from kdrun.student.build import build as build_network
from kdrun.student.language import position_limit
from kdrun.student.taps import Tapped, model_spec
from kdrun.student.weights import load_weights
from kdrun.teacher.corrupted import CorruptedLive, CorruptedTruth, Corruption
from kdrun.teacher.follower import CurrentTeacher, EmaTeacher, Follower, SnapshotTeacher
from kdrun.teacher.live import LiveTeacher, affine_between
from kdrun.teacher.once import OnceTeacher
from kdrun.teacher.silent import NoTeacher
from kdrun.teacher.truth import TruthTeacher
from kdrun.types import Context, ModelSpec, Source, Teacher

TEACHER_KINDS = ("none", "truth", "live", "snapshot", "ema", "current")
TEACHER = "teacher"  # plan.start_from: the student begins as its teacher


@dataclass
class Built:
    """The parts of one training stage, on their device, checked against each other."""

    data: Data
    network: nn.Module  # the bare student: what is exported
    learner: Learner
    teacher: Teacher
    objective: Objective
    evaluation: Any
    memory_format: torch.memory_format
    tree: Mapping[str, Any]  # the configuration that they were built from
    steps_per_epoch: int
    total_steps: int


def synchronised(module: nn.Module, device: torch.device, ranks: Ranks) -> Any:
    """BatchNorm over all ranks, on GPUs. Before the taps are hooked: the conversion makes new modules, without hooks."""
    if ranks.world > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def load_data(tree: Mapping[str, Any]) -> Data:
    """Load the data set that the tree names. Raises `Refused` where it is missing or does not fit its description."""
    return instantiate(tree["dataset"], "dataset", allowed(tree)).load()


def open_source(tree: Mapping[str, Any], data: Data, device: torch.device, ranks: Ranks) -> Source:
    """This rank's batches of the training split. Raises `Refused` where the data's size does not fit the steps or the ranks."""
    return instantiate(tree["source"], "source", allowed(tree)).open(
        data, "train", seed=tree["seed"], micro_batch=tree["hardware"]["micro_batch"], rank=ranks.rank, world=ranks.world, device=device
    )


def build(
    tree: Mapping[str, Any], data: Data, device: torch.device, ranks: Ranks, within: AbstractContextManager[Any] | None = None
) -> Built:
    """Build and check everything that one stage trains with. Raises `Refused`; spends nothing but memory.

    `within`: a context in which the networks are made, such as one whose tensors have a shape and no content; they stay where they are.
    """
    objective = instantiate(tree["objective"], "objective", allowed(tree))
    needs = objective.needs()
    memory_format = torch.channels_last if channels_last(tree["hardware"], data.input_shape) else torch.contiguous_format
    problems: list[Problem] = []
    # On its device first: a teacher that follows the student copies it there.
    with within or nullcontext():
        network = synchronised(build_student_network(tree, data), device, ranks)
    network = network if within else network.to(device)
    student_spec = _spec(tree, network, "student", data, _asked(tree, "student", needs.student_taps), problems)
    with within or nullcontext():
        teacher = build_teacher(tree, data, needs.teacher_taps, problems, network)
    _check_needs(tree, data, objective, teacher, tuple(getattr(network, "takes", ())), problems)
    live = {"teacher": teacher.network} if isinstance(teacher, LiveTeacher) else {}
    problems += text_problems(data, {"student": network, **live}, objective)
    problems += packing_problems(tree, data, {"student": network, **live}) + context_problems(data, {"student": network, **live})
    problems += beside_problems(tree, data, objective) + mixing_problems(tree, objective)
    evaluation = instantiate(tree["evaluation"], "evaluation", allowed(tree))
    problems += writing_problems(tree, data, objective, evaluation, {"student": network, **live})
    problems += evaluation.problems(data)
    problems += placement_problems(tree, objective)
    if not problems:
        problems += _start_problems(tree, network, teacher)
        problems += objective.problems(tree, network, teacher.network if isinstance(teacher, LiveTeacher) else None)
        problems += cache_problems(tree, data, objective, teacher)
    if problems or student_spec is None:
        raise Refused(problems)
    student = Tapped(network, tree["student"].get("taps") or {}, needs.student_taps, "student.taps")
    per_epoch = steps_in_epoch(tree, data)
    total_steps = tree["optim"].get("steps") or max(1, round(tree["optim"]["epochs"] * per_epoch))
    torch.manual_seed(rng.key(tree["seed"], "connectors"))
    context = Context(student_spec, teacher.spec, data.classes, data.labels_by_id("train"), tree["seed"], per_epoch, total_steps)
    connectors = synchronised(objective.setup(context), device, ranks)
    learner = Learner(student, connectors, objective, ranks)
    objective.to(device)
    if within is None:
        learner = learner.to(device).to(memory_format=memory_format)
    if isinstance(teacher, LiveTeacher) and within is None:
        teacher.to(device, memory_format, tree["teacher"].get("placement", "same"))
    return Built(data, network, learner, teacher, objective, evaluation, memory_format, tree, per_epoch, total_steps)


def steps_in_epoch(tree: Mapping[str, Any], data: Data) -> int:
    """Optimiser steps of an epoch. Raises `Refused` for a batch that no epoch fills."""
    samples, batch_size = len(data.splits["train"]), tree["source"].get("batch_size")
    if data.whole:
        return 1
    if tree["source"].get("steps_per_epoch"):
        return int(tree["source"]["steps_per_epoch"])
    batch_size = int(batch_size or samples)
    per_epoch = samples // batch_size if tree["source"].get("drop_last") else -(-samples // batch_size)
    if per_epoch == 0:
        raise Refused(
            Problem(f"{samples} training samples make no batch of {batch_size}", "source.batch_size", "", f"source.batch_size={samples}")
        )
    return per_epoch


def build_first(
    tree: Mapping[str, Any], data: Data, device: torch.device, ranks: Ranks, within: AbstractContextManager[Any] | None = None
) -> Built:
    """`build` for the first training stage of the tree's plan."""
    plan = instantiate(tree["plan"], "plan", allowed(tree))
    problems = plan.problems(tree, data)
    if problems:
        raise Refused(problems)
    return build(tree, plan.view(tree, data), device, ranks, within)


def given_weights(tree: Mapping[str, Any]) -> dict[str, Path]:
    """The files of weights that a configuration names, by key; of another run's folder its student."""
    teacher = tree["teacher"].get("checkpoint") if tree["teacher"].get("kind") == "live" else None
    files = {"student.checkpoint": tree["student"].get("checkpoint"), "teacher.checkpoint": teacher}
    found = {key: Path(file) for key, file in files.items() if file}
    if tree["plan"].get("start_from") and tree["plan"]["start_from"] != TEACHER:
        start = Path(tree["plan"]["start_from"])
        found["plan.start_from"] = start / STUDENT_FILE if start.is_dir() else start
    return found


def start_from(built: Built) -> Built:
    """A new run that begins with another run's student (not a resume: optimiser and data start anew)."""
    file = given_weights(built.tree).get("plan.start_from")
    if file is not None:
        load_weights(built.network, file, key="plan.start_from")
        follow_anew(built)
    return built


def follow_anew(built: Built) -> None:
    """A teacher that is the student itself begins with the weights that the student begins with."""
    if isinstance(built.teacher, Follower):
        built.teacher.network.load_state_dict(built.network.state_dict())


def start_from_teacher(built: Built) -> None:
    """The student begins as its teacher, whose weights are there (plan.start_from=teacher)."""
    assert isinstance(built.teacher, LiveTeacher)
    built.network.load_state_dict(built.teacher.network.state_dict())


def _start_problems(tree: Mapping[str, Any], network: nn.Module, teacher: Teacher) -> list[Problem]:
    """Why the student cannot begin as its teacher, where it is to."""
    if tree["plan"].get("start_from") != TEACHER:
        return []
    if not isinstance(teacher, LiveTeacher):
        what, remedy = "there is no teacher with weights of its own to begin as", "a live teacher, or plan.start_from=null"
        return [Problem(what, "plan.start_from", "", remedy)]
    own, theirs = network.state_dict(), teacher.network.state_dict()
    if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items()}:
        return []
    what = "the student is another network than the teacher"
    return [Problem(what, "plan.start_from", "", "the same student as teacher, or plan.start_from=null")]


def build_student_network(tree: Mapping[str, Any], data: Data) -> nn.Module:
    """The bare student with its seeded initial weights, or those of student.checkpoint."""
    torch.manual_seed(rng.key(tree["seed"], "student"))
    node = tree["student"]
    network = build_network(node, data.classes, data.input_shape, allowed=allowed(tree), reserved=STUDENT_KEYS, key="student")
    if node.get("checkpoint"):
        load_weights(network, node["checkpoint"], node.get("rename") or (), key="student.checkpoint")
    return network


def build_teacher(
    tree: Mapping[str, Any], data: Data, wanted: tuple[str, ...], problems: list[Problem], student: nn.Module | None = None
) -> Teacher:
    """The teacher with its taps and its contract checked. Weights come later (`load_weights` or a training stage)."""
    node = tree["teacher"]
    kind = node.get("kind", "none")
    if kind == "none":
        return NoTeacher()
    corruption = Corruption(data, node["corrupt"], node.get("seed", 0)) if node.get("corrupt") else None
    if kind == "truth":
        row = node.get("extra") or "truth_logits"
        if corruption is not None:
            return CorruptedTruth(corruption, data.classes, data.input_shape, row)
        return TruthTeacher(data.classes, data.input_shape, row)
    if kind in ("snapshot", "ema", "current"):
        return _in_its_context(node, _follower(tree, data, kind, wanted, problems, student))
    if kind != "live":
        raise Refused(Problem(f"there is no kind of teacher named '{kind}'", "teacher.kind", "", did_you_mean(kind, TEACHER_KINDS)))
    torch.manual_seed(rng.key(node.get("seed", 0), "student"))
    data = data.translated or data  # what it reads, where that is not what the student reads
    classes = node.get("classes") or data.classes
    module = build_network(node, classes, data.input_shape, allowed=allowed(tree), reserved=TEACHER_KEYS, key="teacher")
    problems += list(_teacher_contract(node, data))
    spec = _spec(tree, module, "teacher", data, _asked(tree, "teacher", wanted), problems)
    if spec is None:
        return NoTeacher()  # its problems are on the list; nothing will run
    tapped = Tapped(module, node.get("taps") or {}, wanted, "teacher.taps")
    affine = None
    if node.get("mean") is not None and node.get("renormalise") and not problems:
        affine = affine_between(data.mean, data.std, node["mean"], node["std"])
    if corruption is not None:
        return CorruptedLive(corruption, tapped, spec, affine)
    return OnceTeacher(tapped, spec, affine) if data.whole else _in_its_context(node, LiveTeacher(tapped, spec, affine))


def _in_its_context(node: Mapping[str, Any], teacher: Any) -> Any:
    teacher.privileged = node.get("prompt") == "privileged"
    return teacher


def _follower(
    tree: Mapping[str, Any], data: Data, kind: str, wanted: tuple[str, ...], problems: list[Problem], student: nn.Module | None
) -> Teacher:
    """The student's own past or average, with the student's taps."""
    assert student is not None
    taps = tree["student"].get("taps") or {}
    spec = _spec(tree, student, "student", data, _asked(tree, "teacher", wanted), problems)
    if spec is None:
        return NoTeacher()  # its problems are on the list; nothing will run
    if kind in ("snapshot", "current"):
        return (SnapshotTeacher if kind == "snapshot" else CurrentTeacher)(student, spec, taps, wanted)
    return EmaTeacher(student, spec, taps, wanted, tree["teacher"].get("decay", 0.999))


def _asked(tree: Mapping[str, Any], who: str, wanted: tuple[str, ...]) -> dict[str, str]:
    """The taps that an objective wants of the student or teacher (`who`), and where each is named: by a field of the objective, such as
    student_tap or teacher_taps, or else among the network's own."""
    named: dict[str, str] = {}
    for key, value in tree["objective"].items():
        if key.startswith(who):
            named |= {str(tap): f"objective.{key}" for tap in (value if isinstance(value, list) else [value])}
    return {tap: named.get(tap, f"{who}.taps") for tap in wanted}


def _spec(
    tree: Mapping[str, Any], network: nn.Module, who: str, data: Data, asked: Mapping[str, str], problems: list[Problem]
) -> ModelSpec | None:
    """The outside of a network on this data with the taps that are asked for, or None with the reasons on the list."""
    node = tree[who]
    # The longest row that is allowed may be longer than any is, and than what the network has positions for.
    shape = data.input_shape if data.vocabulary is None else (min(data.input_shape[0], position_limit(network) or data.input_shape[0]),)
    try:
        spec = model_spec(network, shape, node.get("taps") or {}, list(asked), f"{who}.taps", asked)
    except Refused as refused:
        problems += refused.problems
        return None
    if node.get("speaks") != "tensor" and spec.classes != data.classes and node.get("classes") in (None, data.classes):
        what = f"the {who} speaks of {spec.classes} classes, {data.name} has {data.classes}"
        problems.append(Problem(what, who, "", f"a network whose forward returns [B, {data.classes}] logits"))
    return spec


def _teacher_contract(node: Mapping[str, Any], data: Data) -> list[Problem]:
    """What the teacher says of itself must fit the data: classes, input size, normalisation."""
    found = []
    classes = node.get("classes")
    if classes is not None and classes != data.classes:
        found.append(
            Problem(
                f"the teacher has {classes} classes, {data.name} has {data.classes}",
                "teacher.classes",
                "",
                "choose a teacher for this data set",
            )
        )
    size = node.get("input_size")
    if size is not None and tuple(size) != tuple(data.input_shape):
        found.append(
            Problem(
                f"the teacher was made for inputs {list(size)}, {data.name} gives {list(data.input_shape)}",
                "teacher.input_size",
                "",
                "choose another teacher, or the data set's transform that gives its size",
            )
        )
    mean, std = node.get("mean"), node.get("std")
    if mean is None or std is None:
        return found
    if node.get("renormalise") and (len(mean), len(std)) != (len(data.mean), len(data.std)):
        found.append(
            Problem(
                f"{len(mean)} means and {len(std)} standard deviations, where {data.name} has {len(data.mean)}",
                "teacher.mean",
                "",
                "one for each of its channels",
            )
        )
    elif not node.get("renormalise"):
        ours = [*data.mean, *data.std]
        same = len(ours) == len(mean) + len(std) and all(abs(a - b) < 1e-3 for a, b in zip([*mean, *std], ours, strict=True))
        if not same:
            found.append(
                Problem(
                    f"the teacher was trained with mean {list(mean)}, std {list(std)}; "
                    f"{data.name} is normalised with {list(data.mean)}, {list(data.std)}",
                    "teacher.mean",
                    "",
                    "teacher.renormalise=true hands it inputs normalised its own way",
                )
            )
    return found


def _check_needs(
    tree: Mapping[str, Any], data: Data, objective: Objective, teacher: Teacher, taken: tuple[str, ...], problems: list[Problem]
) -> None:
    """What the objective asks for, and what the student's forward takes beside its input, must be there."""
    needs, name = objective.needs(), type(objective).__name__
    if (needs.teacher_logits or needs.teacher_taps or needs.teacher_network) and tree["teacher"].get("kind", "none") == "none":
        problems.append(
            Problem(
                f"{name} needs a teacher and there is none",
                "teacher",
                "",
                "choose one, e.g. teacher=resnet56 (`kdrun ls teachers`), or objective=ce",
            )
        )
    if needs.teacher_taps and isinstance(teacher, TruthTeacher):
        what = f"{name} needs features of the teacher; a known posterior has none"
        problems.append(Problem(what, "teacher", "", "teacher=mlp, or an objective on logits"))
    if needs.teacher_network and not isinstance(teacher, (LiveTeacher, NoTeacher)):
        problems.append(Problem(f"{name} needs a teacher network", "teacher", "", "a live teacher, e.g. teacher=mlp"))
    if tree["teacher"].get("kind") == "snapshot" and needs.teacher_logits and not needs.silence:
        what = f"{name} needs a teacher in every step, and the student's own past says nothing in the first epoch"
        problems.append(Problem(what, "teacher", "", "teacher=ema, or objective=ps_kd objective.memory=model"))
    if needs.held_out and not tree["source"].get("held_out"):
        remedy = "source.held_out=128, with dataset.validation=0.1 if there is no validation split"
        problems.append(Problem(f"{name} learns from validation rows, and none come with the batches", "source.held_out", "", remedy))
    rows = {*data.splits["train"].extra, *data.splits["train"].constants}
    wanted = {*needs.extra, *([teacher.row] if isinstance(teacher, TruthTeacher) else [])}
    if "edge_index" in taken and not data.whole:
        what = f"the student looks along the edges of a graph, and {data.name} is none"
        problems.append(Problem(what, "student", "", "a graph, e.g. dataset=csbm, or another student, e.g. student=mlp"))
    for row in sorted(wanted - rows):
        problems.append(
            Problem(
                f"{data.name} has no '{row}' rows",
                "dataset",
                "",
                f"rows it has: {', '.join(sorted(rows)) or 'none'}; a world with a known truth: dataset=gaussians",
            )
        )
    if objective.coupling == "batch" and tree["hardware"]["micro_batch"] is not None:
        problems.append(
            Problem(
                f"{name} compares samples of a batch with each other, so the batch cannot be split",
                "hardware.micro_batch",
                "",
                "hardware.micro_batch=null, with a smaller source.batch_size if memory is short",
            )
        )
