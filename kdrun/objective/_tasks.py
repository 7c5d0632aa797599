"""The task's own loss beside a distillation of maps: cross-entropy on labels, or a detector's losses on boxes and classes."""

from __future__ import annotations

from typing import Literal

from kdrun import rng
from kdrun.errors import Problem, Refused
from kdrun.losses.divergence import cross_entropy
from kdrun.types import Batch, Output, Progress, Start, Term

Task = Literal["ce", "detection"]
# The names of a task's terms. A detector's are the columns of what it returns in training.
TERMS: dict[Task, tuple[str, ...]] = {"ce": ("ce",), "detection": ("classification", "boxes")}
EXTRA: dict[Task, tuple[str, ...]] = {"ce": (), "detection": ("boxes",)}  # rows of Batch.extra that a task needs


def task_terms(task: Task, output: Output, batch: Batch) -> dict[str, Term]:
    """The task's terms of one micro-batch: nats per label; a detector's losses per sample (image)."""
    if task == "detection":
        return {name: Term(output.logits[:, i].float().sum(), "sample") for i, name in enumerate(TERMS[task])}
    return {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}


def with_truth(task: Task, batch: Batch, seed: int, progress: Progress) -> Batch:
    """What a detector's forward takes in training: its `labels` [B, M], -1 also for crowds, which nobody is taught to find, and
    `draw` [B], the key of the draws that it makes about an image in this step."""
    if task != "detection":
        return batch
    crowd = batch.extra.get("crowd")
    labels = batch.targets if crowd is None else batch.targets.masked_fill(crowd, -1)
    draw = rng.bits(rng.key(seed, "boxes to learn from"), progress.step, batch.ids)
    return batch._replace(extra={**batch.extra, "labels": labels, "draw": draw})


def refuse_others(task: Task, start: Start) -> None:
    """Raise `Refused` where a detector is asked for and the student is none."""
    if task == "detection" and "boxes" not in getattr(start.student, "takes", ()):
        what = f"a {type(start.student).__name__} finds no objects"
        raise Refused(Problem(what, "student", remedy="a detector: student=retinanet or student=faster_rcnn"))
