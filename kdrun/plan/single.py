"""What runs after what, for the plain case: the teacher, if it must be trained, then the student."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.config.compose import flatten
from kdrun.errors import Problem, Refused, did_you_mean

# A change of the training code that changes results must change this number: trained teachers are kept by content.
TEACHER_FORMAT = 2


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
    own = {"kind", "policy", "claim", "renormalise", "mean", "std", "input_size", "classes", "fit", "seed"}
    stage["student"] = {k: v for k, v in node.items() if k not in own}
    stage["teacher"] = {"kind": "none"}
    stage["objective"] = {"_target_": "kdrun.objective.ce.CE"}
    stage["seed"] = node.get("seed", 0)
    stage["optim"] = {**stage["optim"], "ema": None}
    stage["plan"] = {"kind": "single", "start_from": None}
    for key, value in flatten(node.get("fit") or {}).items():
        _set(stage, key, value)
    content = {k: stage[k] for k in ("student", "dataset", "source", "optim", "seed")}
    content |= {"data": fingerprint, "format": TEACHER_FORMAT, "max_steps": stage["run"]["max_steps"], "dry": stage["run"]["dry"]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
    name = str(node["_target_"]).rpartition(".")[2]
    return StageSpec("teacher", stage, Path(tree["run"]["root"]) / "teachers" / f"{name}-{digest}")


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        raise Refused(Problem("unknown key", f"teacher.fit.{key}", "", did_you_mean(key, flatten(tree))))
    node[leaf] = value
