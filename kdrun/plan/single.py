"""What runs after what, for the plain case: the teacher, if it must be trained, then the student."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.config.compose import LOCATION, flatten
from kdrun.config.schema import STUDENT_KEYS, TEACHER_KEYS
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.plan.base import Plan, Session

# A change of the training code that changes results must change this number: trained teachers are kept by content.
TEACHER_FORMAT = 3


@dataclass(eq=False)
class Single(Plan):
    """One student trained once."""

    def run(self, session: Session) -> Any:
        built = session.build()
        session.ready_teacher(built)
        return session.finish(session.train(None, built))


@dataclass(frozen=True)
class StageSpec:
    """One training stage of a plan: a configuration of its own and the folder it writes to."""

    name: str
    tree: Mapping[str, Any]
    folder: Path


def teacher_stage(tree: Mapping[str, Any], fingerprint: str) -> StageSpec | None:
    """The stage that trains the teacher from labels, or None if its weights come from elsewhere.

    By default it uses the student's schedule (as the published CIFAR protocol does); `teacher.fit` overrides single
    keys, e.g. {optim.lr: 0.05}. The folder is named by content, so every run that needs this teacher finds the same one.
    Raises `Refused` where `teacher.fit` names a key that there is not.
    """
    node = tree["teacher"]
    if node.get("kind") != "live" or node.get("checkpoint") or node.get("pretrained"):
        return None
    stage = copy.deepcopy(dict(tree))
    # The student's own keys that a teacher's node does not have; everything else (the network) is the teacher's.
    own = TEACHER_KEYS - STUDENT_KEYS
    stage["student"] = {k: v for k, v in node.items() if k not in own}
    stage["teacher"] = {"kind": "none"}
    if stage["dataset"].get("teacher_tokenizer"):
        stage["dataset"] = {**stage["dataset"], "tokenizer": stage["dataset"]["teacher_tokenizer"], "teacher_tokenizer": None}
    stage["objective"] = {"_target_": "kdrun.objective.ce.CE"}
    stage["seed"] = node.get("seed", 0)
    stage["optim"] = {**stage["optim"], "ema": None}
    stage["optim"]["phases"] = {}
    stage["cache"] = {**(stage.get("cache") or {}), "format": None, "path": None}
    stage["plan"] = {"_target_": "kdrun.plan.single.Single", "start_from": None}
    with_changes(stage, node.get("fit") or {}, "teacher.fit")
    content = {k: stage[k] for k in ("student", "source", "optim", "objective", "seed")}
    # Where the data lies and how many workers read it changes no teacher; the fingerprint says which data it is.
    content["dataset"] = {k: v for k, v in stage["dataset"].items() if k not in LOCATION}
    content["chosen_by"] = _choice(stage["evaluation"])
    content |= {"data": fingerprint, "format": TEACHER_FORMAT, "max_steps": stage["run"]["max_steps"], "dry": stage["run"]["dry"]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
    name = str(node["_target_"]).rpartition(".")[2]
    return StageSpec("teacher", stage, Path(tree["run"]["root"]) / "teachers" / f"{name}-{digest}")


def _choice(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What decides which epoch's weights are kept, where it is not the last one's."""
    if evaluation.get("protocol") != "best_val" and evaluation.get("patience") is None:
        return None
    return {key: evaluation.get(key) for key in ("protocol", "primary", "ties", "patience", "every_epochs")}


def with_changes(tree: dict[str, Any], changes: Mapping[str, Any], place: str) -> None:
    """Put changes into a stage's own tree: single keys, or whole groups that name a class. `place`: where they stand, for errors.

    Raises `Refused` where a change names a key that there is not.
    """
    fit = dict(changes)
    for group in [g for g, value in fit.items() if isinstance(value, Mapping) and "_target_" in value]:
        tree[group] = dict(fit.pop(group))  # a group of its own: another objective, source or evaluation
    for key, value in flatten(fit).items():
        _set(tree, key, value, place)


def _set(tree: dict[str, Any], key: str, value: Any, place: str) -> None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        raise Refused(Problem("unknown key", f"{place}.{key}", "", did_you_mean(key, flatten(tree))))
    node[leaf] = value
