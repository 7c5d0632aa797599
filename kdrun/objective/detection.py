"""Plain training of a detector on boxes and classes: what every distilled one has to beat.

    L = classification + boxes,      the mean over the images

both as torchvision has them for the detector at hand. RetinaNet (arXiv 1708.02002, Sec. 4): focal loss over all anchors and L1 of
the encoded boxes over the positive ones, both divided by the image's positive anchors. Faster R-CNN (arXiv 1506.01497, Eq. 1):
cross-entropy and smooth L1 of the sampled anchors, and of the sampled proposals, each divided by the number of its samples.
MMDetection divides by the positive anchors of the whole batch instead, so that images with many objects count for more.

Units: both terms per sample (image). Constants: those of torchvision, which are the papers' (focal alpha 0.25 and gamma 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kdrun.objective._tasks import EXTRA, TERMS, refuse_others, task_terms, with_truth
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Start, Term


@dataclass(eq=False)
class Detection(Objective):
    compilable: ClassVar[bool] = False  # how many boxes there are is known from image to image alone

    def needs(self) -> Needs:
        return Needs(extra=EXTRA["detection"])

    def setup(self, context: Context) -> Connectors:
        self._seed = context.seed
        return super().setup(context)

    def start(self, start: Start, connectors: Connectors) -> None:
        """Raises Refused for a student that is no detector."""
        refuse_others("detection", start)

    def weights(self, progress: Progress) -> dict[str, float]:
        return dict.fromkeys(TERMS["detection"], 1.0)

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        return with_truth("detection", batch, self._seed, progress)

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        return task_terms("detection", output, batch)
