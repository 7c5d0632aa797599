"""What goes with images that are mixed of two: dataset.mixup, dataset.cutmix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdrun.errors import Problem
from kdrun.objective.base import Objective

KEYS = ("mixup", "cutmix")
TAKERS = "ce, dist, fitnet, kd, label_smoothing, rkd or soft_ce"  # the objectives with `mixes`


def mixing_problems(tree: Mapping[str, Any], objective: Objective) -> list[Problem]:
    """All that does not fit. The configuration is asked, as a plan may do without the data."""
    on = [key for key in KEYS if tree["dataset"].get(key)]
    if not on:
        return []
    name, teacher, off = type(objective).__name__, tree["teacher"], " ".join(f"dataset.{key}=0" for key in on)
    reasons = [
        (
            not objective.mixes,
            f"{name} asks for one label of each image, and a mixed one has two",
            f"objective={TAKERS}",
        ),
        (not tree["source"].get("augment", True), "images are mixed where they are augmented", "source.augment=true"),
        (teacher.get("kind") == "truth", "what is known of an image does not hold of a mixture", "a live teacher"),
        (bool(teacher.get("corrupt")), "a corrupted teacher speaks of whole images", "teacher.corrupt=0"),
    ]
    return [Problem(what, f"dataset.{on[0]}", "", f"{off}, or {instead}") for is_so, what, instead in reasons if is_so]
