"""What comes beside a text and asks for something: a teacher's own tokens of it (dataset.teacher_tokenizer), a rejected completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdrun.dataset.base import Data
from kdrun.dataset.tokens import REJECTED, STRETCHES
from kdrun.errors import Problem
from kdrun.evaluation.language import BESIDE_TEACHER
from kdrun.objective.base import Objective

LIVE = "live"  # kind of a teacher that is a network of its own

KEY = "dataset.teacher_tokenizer"


def beside_problems(tree: Mapping[str, Any], data: Data, objective: Objective) -> list[Problem]:
    """All that does not fit."""
    return _translated(tree, data, objective) + _pairs(tree, data, objective)


def _pairs(tree: Mapping[str, Any], data: Data, objective: Objective) -> list[Problem]:
    """What an objective that compares completions asks of the data."""
    if not getattr(objective, "compares", False):
        return []
    found, name = [], type(objective).__name__
    if REJECTED not in getattr(data.split("train"), "beside", {}):
        what = f"{name} compares two completions of a prompt, and {data.name} has one"
        found.append(Problem(what, "dataset", data.name, "dataset=text with columns prompt, chosen and rejected, or objective=sft"))
    if tree["source"].get("share") is not None:
        what = "completions that are written during training are not compared in pairs"
        found.append(Problem(what, "source", data.name, "source=loader"))
    return found


def _translated(tree: Mapping[str, Any], data: Data, objective: Objective) -> list[Problem]:
    """All that does not go with a teacher that reads other ids than the student."""
    if data.translated is None:
        return []
    found, kind, name = [], tree["teacher"].get("kind", "none"), type(objective).__name__
    one = f"{KEY}=null with a teacher of the data set's tokenizer"
    if kind not in ("none", LIVE):
        what = "the teacher says its word of the student's tokens, and has no use for others"
        found.append(Problem(what, KEY, data.name, f"{KEY}=null, or a live teacher"))
    needs = objective.needs()
    listens = needs.teacher_logits or needs.teacher_network or getattr(objective, "listens", bool)()
    if listens and not getattr(objective, "translates", False):
        what = f"{name} compares what teacher and student say of one id, and their ids mean different tokens"
        found.append(Problem(what, "objective", data.name, f"objective=uld, or {one}"))
    if tree["source"].get("share") is not None:
        what = "texts that are written during training are known in the student's tokens alone"
        found.append(Problem(what, "source", data.name, f"source=loader, or {one}"))
    if tree["evaluation"].get("primary") in BESIDE_TEACHER:
        what = f"'{tree['evaluation']['primary']}' compares what teacher and student say of one id"
        found.append(Problem(what, "evaluation.primary", data.name, "evaluation.primary=nll"))
    if getattr(objective, "align", None) == "bytes":
        first = torch.zeros(1, dtype=torch.int64)
        if STRETCHES not in data.rows("train", first, first, 0).extra:
            what = "where the two tokenizers cut a text alike is not known: one has no offsets, or a chat template rewrites answers"
            found.append(Problem(what, "objective.align", data.name, "objective.align=tokens, or fast tokenizers"))
    return found
