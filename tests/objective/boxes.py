"""A small detection experiment in which the laws hold exactly: the backbone's BatchNorm is frozen."""

from __future__ import annotations

from pathlib import Path

import torch

from kdrun.student.detector import faster_rcnn, retinanet
from kdrun.student.weights import save_student

ANCHORS = [8, 16, 32, 64, 128]
LEVELS = "[fpn0,fpn1,fpn2,fpn3,fpn4]"


def detection_run(kind: str = "retinanet") -> list[str]:
    """Overrides: 20 images of striped shapes in steps of 8, 8 and 4, two epochs, labels alone."""
    return [
        "dataset=shapes",
        "dataset.n_train=20",
        "dataset.n_test=4",
        f"student={kind}",
        *tiny("student", 8),
        "objective=detection",
        "evaluation=detection",
        "evaluation.examples=0",
        "evaluation.every_epochs=2",
        "source.batch_size=8",
        "optim=adamw",
        "optim.epochs=2",
        "hardware=cpu",
        "hardware.threads=1",
        "run.log_every=1",
    ]


def tiny(who: str, width: int) -> list[str]:
    settings = ("name=plain", f"width={width}", "frozen_norm=true", f"anchor_sizes={ANCHORS}".replace(" ", ""), "detections=20")
    return [f"{who}.{setting}" for setting in settings]


def distilled_run(teacher: Path, kind: str = "retinanet") -> list[str]:
    """The same under ACAM-KD, with a teacher from a file, of which neck and heads are inherited."""
    make, parts = (retinanet, "[backbone.fpn,head]") if kind == "retinanet" else (faster_rcnn, "[backbone.fpn,rpn,roi_heads]")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save_student(make(4, name="plain", width=8, frozen_norm=True, anchor_sizes=ANCHORS), teacher)
    return [
        *detection_run(kind),
        f"teacher={kind}",
        *tiny("teacher", 8),
        f"teacher.checkpoint={teacher}",
        "objective=acam_kd",
        "objective.task=detection",
        "objective.masks=6",
        f"objective.student_taps={LEVELS}",
        f"objective.teacher_taps={LEVELS}",
        "objective.pool=[2,1,1,1,1]",
        f"objective.inherit={parts}",
    ]
