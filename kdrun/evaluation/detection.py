"""Evaluation of a detector: COCO's average precision, and a picture of what it finds.

`map` is the mean over the classes and over the thresholds 0.50, 0.55, ..., 0.95 of the overlap with the truth, `map_50` and `map_75`
those of one threshold; `ap_small`, `ap_medium` and `ap_large` look at objects below 32^2, up to 96^2 and above, in pixels of the file
(Lin et al., ECCV 2014; computed by its authors' pycocotools through torchmetrics).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.evaluation.segmentation import palette, shown
from kdrun.student.taps import ask
from kdrun.types import Batch, Needs, Teacher

PICTURE = "detections.png"
# Our names for torchmetrics'.
METRICS = {
    "map": "map",
    "map_50": "map_50",
    "map_75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
}


@dataclass(eq=False)
class Detection(Evaluation):
    """Percentages: see the module. Raises `Refused` for a field outside its range, and without pycocotools."""

    uses_teacher: ClassVar[bool] = False

    primary: str = "map"
    examples: int = 4  # test images in the picture at the end of a run; 0: no picture
    threshold: float = 0.3  # score from which on a detection is drawn

    def own_problems(self) -> list[Problem]:
        problems = []
        if find_spec("pycocotools") is None:
            what = "average precision needs the package pycocotools, which is not installed"
            problems.append(Problem(what, "evaluation", "", 'pip install "kdrun[detection]"'))
        if self.examples < 0:
            remedy = "e.g. evaluation.examples=4, or 0 for none"
            problems.append(Problem(f"must be at least 0, not {self.examples}", "evaluation.examples", "", remedy))
        if not 0 <= self.threshold <= 1:
            problems.append(Problem(f"a score, not {self.threshold}", "evaluation.threshold", "", "from 0 to 1"))
        return problems

    def names(self, classes: int | None = None) -> list[str]:
        return list(METRICS)

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        meter = DetectionMeter(device)
        for batch, _ in rows:
            meter.add(ask(network, batch), batch)
        return meter.compute()

    @torch.no_grad()
    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """Draw test images, evenly spaced, with their truth and what teacher and student find in them: plots/detections.png."""
        split = data.split("test")
        if not self.examples:
            return
        chosen = torch.linspace(0, len(split) - 1, min(self.examples, len(split))).round().long()
        batch = data.rows("test", chosen, torch.zeros_like(chosen), seed=0, augment=False, device=device)
        was = network.training
        network.eval()
        said = {"student": ask(network, batch)}
        network.train(was)
        found = teacher.signal(batch, Needs(teacher_logits=True)).logits
        if found is not None:
            said = {"teacher": found} | said
        drawn = {"truth": truth_rows(batch)} | {who: rows.cpu() for who, rows in said.items()}
        draw(folder / "plots" / PICTURE, shown(batch, data), drawn, data.class_names, self.threshold)


class DetectionMeter:
    """Streams over an evaluation set; kept are the boxes. In a process group `compute` is a collective."""

    def __init__(self, device: torch.device | str) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self._precision = MeanAveragePrecision(backend="pycocotools").to(device)
        self._precision.warn_on_many_detections = False

    def add(self, detections: Tensor, batch: Batch) -> None:
        """A batch: detections [B, D, 6] as `kdrun.student.detector` has them, and the batch's boxes."""
        zoom = batch.extra["zoom"].repeat(1, 2)[:, None]  # back to pixels of the file, by which objects are small or large
        said, truth = [], []
        for rows, boxes in zip(detections.float(), detections[..., :4].float() / zoom, strict=True):
            there = rows[:, 5] >= 0
            said.append({"boxes": boxes[there], "scores": rows[there, 4], "labels": rows[there, 5].long()})
        for i, boxes in enumerate(batch.extra["boxes"] / zoom):
            there = batch.targets[i] >= 0
            further = {"iscrowd": batch.extra["crowd"][i][there].long(), "area": batch.extra["area"][i][there]}
            truth.append({"boxes": boxes[there], "labels": batch.targets[i][there], **further})
        self._precision.update(said, truth)

    def compute(self) -> dict[str, float]:
        """The metrics by name, in percent, but for objects of a size that does not occur. Raises `RunFailed` without any object."""
        found: Mapping[str, Tensor] = self._precision.compute()
        if found["map"] < 0:
            raise RunFailed("the evaluation saw no object: its data set is empty, or has images alone")
        return {ours: 100 * float(found[theirs]) for ours, theirs in METRICS.items() if found[theirs] >= 0}


def truth_rows(batch: Batch) -> Tensor:
    """The objects of a batch in the form of detections [B, M, 6], of score 1."""
    targets = batch.targets[..., None].float()
    return torch.cat([batch.extra["boxes"], torch.ones_like(targets), targets], -1).cpu()


def draw(file: Path, images: Tensor, found: Mapping[str, Tensor], class_names: Sequence[str], threshold: float) -> None:
    """One row for each image [B, H, W, 3], one column for everyone who found something in it: rows [B, D, 6] by who says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    colours: list[Any] = palette(len(class_names)).tolist()
    aspect = images.shape[2] / images.shape[1]
    size = 3.0 * max(1.0, aspect) * len(found), 3.0 * max(1.0, 1 / aspect) * len(images) + 0.4
    figure, axes = pyplot.subplots(len(images), len(found), figsize=size, squeeze=False, layout="constrained")
    for column, (who, rows) in enumerate(found.items()):
        axes[0, column].set_title(who)
        for axis, image, boxes in zip(axes[:, column], images, rows, strict=True):
            axis.imshow(image.numpy(), interpolation="nearest", extent=(0, images.shape[2], images.shape[1], 0))
            axis.set(xticks=[], yticks=[])
            for x1, y1, x2, y2, score, label in boxes[(boxes[:, 5] >= 0) & (boxes[:, 4] >= threshold)].tolist():
                colour = colours[int(label)]
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
                name = class_names[int(label)] + ("" if who == "truth" else f" {score:.2f}")
                axis.text(x1, y1, name, fontsize=6, color="black", va="bottom", bbox={"facecolor": colour, "pad": 0.5, "linewidth": 0})
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
