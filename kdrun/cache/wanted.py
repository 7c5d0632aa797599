"""What a run would keep of its teacher: whether that can be, what it is made of, and how much of it there is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdrun.cache.format import Format
from kdrun.cache.store import Ints
from kdrun.config.schema import TEACHER_KEYS
from kdrun.dataset.base import Data, Split, Storage, Taken
from kdrun.dataset.tokens import Ragged, TokenSplit
from kdrun.errors import Problem
from kdrun.objective.base import Objective
from kdrun.source.loader import Loader
from kdrun.student.weights import sha256_of
from kdrun.teacher.corrupted import CorruptedLive
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Needs, Teacher

OFF = "cache=off"


def wanted(tree: Mapping[str, Any]) -> bool:
    """Whether a run is to keep what its teacher says. Without a teacher (labels alone, beside others) there is nothing to keep."""
    return bool((tree.get("cache") or {}).get("format")) and tree["teacher"].get("kind", "none") != "none"


def heard(needs: Needs) -> bool:
    """Whether an objective listens to a teacher in its steps; what nobody hears is not kept."""
    return bool(needs.teacher_logits or needs.teacher_taps)


def problems(
    tree: Mapping[str, Any], data: Data, objective: Objective, needs: Needs, teacher: Teacher, source: Any, epochs: float
) -> list[Problem]:
    """Why what the teacher says cannot be kept as the configuration wants. `source`: the class that the source names."""
    if not wanted(tree) or not (heard(needs) or needs.teacher_network):
        return []
    reasons = [
        (data.whole, f"what a teacher says of {data.name}, one graph, is computed once anyway", OFF),
        (not isinstance(teacher, LiveTeacher), f"a teacher of kind {tree['teacher'].get('kind')} says nothing that could be kept", OFF),
        (isinstance(teacher, CorruptedLive), "a corrupted teacher speaks of other samples than those of the batch", OFF),
        (needs.teacher_network, f"{type(objective).__name__} asks the teacher's network about inputs of its own", OFF),
        (not issubclass(source, Loader), "batches that are not the data set's own never come again", f"source=loader, or {OFF}"),
        (data.translated is not None, "what a teacher says in tokens of its own cannot be laid beside the student's yet", OFF),
        (bool(needs.teacher_taps) and data.vocabulary is not None, "features of texts are not kept", OFF),
    ]
    found = [Problem(what, "cache.format", "", remedy) for is_so, what, remedy in reasons if is_so]
    return found or _format_problems(tree, data, objective, needs, teacher, epochs)


def _format_problems(
    tree: Mapping[str, Any], data: Data, objective: Objective, needs: Needs, teacher: Teacher, epochs: float
) -> list[Problem]:
    node, found = tree["cache"], []
    form = format_of(tree, data, objective, needs, teacher)
    if form.name == "topk" and needs.teacher_logits:
        name = type(objective).__name__
        if objective.sparse == "invalid":
            what = f"{name} needs every number that the teacher says, and the {form.k} largest are kept"
            found.append(Problem(what, "cache.format", "", "cache=dense, cache=int8, or an objective that takes them: kd, lm_kd"))
        if form.shape is None or len(form.shape) != 1:
            found.append(Problem("the largest of a row are kept, and pixels are no rows", "cache.format", "", "cache=dense or cache=int8"))
        elif not 1 <= form.k < form.shape[0]:
            what = f"{form.k} of {form.shape[0]} are to be kept"
            found.append(Problem(what, "cache.k", "", f"1 to {form.shape[0] - 1}, or cache=dense"))
    if not found and (size := total_bytes(form, tree, data, epochs)) > node["limit_gb"] * 1e9:
        what = f"the rows of {views(tree, data, epochs)} views would take {size / 1e9:,.1f} GB ({form})"
        remedy = "cache=int8 or cache=topk, fewer views (source.views=10), or a larger cache.limit_gb"
        found.append(Problem(what, "cache.limit_gb", "", remedy))
    return found


def format_of(tree: Mapping[str, Any], data: Data, objective: Objective, needs: Needs, teacher: Teacher) -> Format:
    """How an item of this run is kept."""
    node, spec = tree["cache"], teacher.spec
    assert spec is not None
    # Of a text each scored token is an item; the last dimension of what is said of a row is its vocabulary.
    shape = spec.output or (spec.classes,)
    shape = (shape[-1],) if data.vocabulary is not None else shape
    taps = {name: tuple(spec.taps[name]) for name in needs.teacher_taps}
    temperature = float(getattr(objective, "temperature", 1.0))
    return Format(node["format"], shape if needs.teacher_logits else None, taps, node["dtype"], node["k"], temperature)


@dataclass(frozen=True)
class Redrawn:
    """Whether the rows of a split differ from view to view; where they do not, one view holds for every epoch and seed."""

    yes: bool

    @staticmethod
    def of(tree: Mapping[str, Any], split: Split) -> Redrawn:
        storage: Any = split.storage
        while isinstance(storage, Taken):
            storage = storage.storage
        fixed = isinstance(storage, Ragged) or not tree["source"].get("augment", True)
        return Redrawn(not fixed and bool(getattr(getattr(storage, "transform", None), "random", True)))

    def view(self, view: int) -> int:
        return view if self.yes else 0


def views(tree: Mapping[str, Any], data: Data, epochs: float) -> int:
    """How many views of every sample a run asks about."""
    if not Redrawn.of(tree, data.split("train")).yes:
        return 1
    return min(math.ceil(epochs), tree["source"].get("views") or math.ceil(epochs))


def total_bytes(form: Format, tree: Mapping[str, Any], data: Data, epochs: float) -> int:
    """Of all views of a run."""
    return int(counts(data.split("train")).sum()) * form.record.itemsize * views(tree, data, epochs)


def counts(split: Split) -> Ints:
    """Items of every sample of a split, int64 [N]: 1, or its scored tokens."""
    if not isinstance(split, TokenSplit):
        return np.ones(len(split), np.int64)
    return _scored(split.storage).numpy()


def _scored(storage: Storage) -> Tensor:
    if isinstance(storage, Ragged):
        return storage.scored_counts()
    if isinstance(storage, Taken):
        return _scored(storage.storage)[storage.positions]
    return torch.full((len(storage),), getattr(storage, "length", 1))  # a stand-in for planning: every token is scored


def made_of(tree: Mapping[str, Any], data: Data, form: Format, teacher: LiveTeacher, loaded: bool = True) -> dict[str, Any]:
    """Everything that a stored row depends on. `loaded`: whether the teacher's weights are in place, or are not known yet."""
    affine = None if teacher.affine is None else [v.tolist() for v in teacher.affine]
    weights = sha256_of(teacher.module) if loaded else None
    return {
        "teacher": {"sha256": weights, "renormalised": affine, "prompt": tree["teacher"].get("prompt", "own")},
        "network": _described(tree["teacher"], teacher.network),
        "taps": {name: (tree["teacher"].get("taps") or {}).get(name, name) for name in form.taps},
        "data": data.fingerprint,
        "vocabulary": None if data.vocabulary is None else data.vocabulary.digest,
        "seed": tree["seed"] if Redrawn.of(tree, data.split("train")).yes else None,
        "format": form.describe(),
        "autocast": tree["hardware"]["dtype"],
    }


def _described(node: Mapping[str, Any], network: nn.Module) -> str:
    """A hash of what a network does with its weights: its layers as they print themselves, its arguments, a language model's settings."""
    own = {k: v for k, v in node.items() if k not in TEACHER_KEYS and k not in ("name", "trust_remote_code")}
    config: Any = getattr(network, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
    told = json.dumps([repr(network), own, settings], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()
