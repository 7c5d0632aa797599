"""A small segmentation experiment without BatchNorm's coupling, in which the laws hold exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kdrun.student.segmenter import segmenter
from kdrun.student.weights import save_student
from tests.engine.parts import freeze_norms


def frozen_segmenter(num_classes: int, in_channels: int = 3) -> nn.Module:
    return freeze_norms(segmenter(num_classes, in_channels, width=6))


def dense_run(teacher: Path) -> list[str]:
    """Overrides: 20 striped images in steps of 8, 8 and 4, three epochs, a teacher from a file."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save_student(segmenter(5, width=8, blocks=3, context=True), teacher)
    return [
        "dataset=stripes",
        "dataset.n_train=20",
        "dataset.n_test=6",
        "teacher=segmenter",
        "teacher.width=8",
        "teacher.blocks=3",
        "teacher.context=true",
        f"teacher.checkpoint={teacher}",
        "student=segmenter",
        "evaluation=segmentation",
        "evaluation.examples=0",
        "source.batch_size=8",
        "optim=adamw",
        "optim.epochs=3",
        "hardware=cpu",
        "hardware.threads=1",
        "run.log_every=1",
        "run.allow=[tests]",
    ]


FROZEN = ["student=custom", "student._target_=tests.objective.dense.frozen_segmenter", "student.taps={map: map}"]
