"""Evaluation of a segmentation network: intersection over union of the classes, and what its predictions look like.

mIoU is that of the confusion matrix pooled over all labelled pixels of the split, as in the VOC and Cityscapes benchmarks; a class
that occurs neither in truth nor in prediction has no IoU and is left out of the mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from kdrun.dataset.base import Data
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.student.taps import ask
from kdrun.types import Batch, Needs, Teacher

PICTURE = "segmentation.png"


@dataclass(eq=False)
class Segmentation(Evaluation):
    """Percentages: `miou`, `pixel_accuracy`, and `iou_<class>` of every class. Raises `Refused` for a field outside its range."""

    uses_teacher: ClassVar[bool] = False

    primary: str = "miou"
    examples: int = 4  # test images in the picture at the end of a run; 0: no picture

    def own_problems(self) -> list[Problem]:
        if self.examples >= 0:
            return []
        return [Problem(f"must be at least 0, not {self.examples}", "evaluation.examples", "", "e.g. evaluation.examples=4, or 0 for none")]

    def names(self, classes: int | None = None) -> list[str]:
        return ["miou", "pixel_accuracy"]

    def meter(self, classes: int, device: torch.device | str) -> Meter:
        return Meter([str(c) for c in range(classes)], device)

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        meter = Meter(data.class_names, device)
        for batch, _ in rows:
            meter.update(ask(network, batch), batch.targets)
        return meter.compute()

    @torch.no_grad()
    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """Draw test images, evenly spaced, beside their truth and what teacher and student make of them: plots/segmentation.png."""
        split = data.split("test")
        if not self.examples:
            return
        chosen = torch.linspace(0, len(split) - 1, min(self.examples, len(split))).round().long()
        batch = data.rows("test", chosen, torch.zeros_like(chosen), seed=0, augment=False, device=device)
        was = network.training
        network.eval()
        said = {"student": ask(network, batch).argmax(1).cpu()}
        network.train(was)
        logits = teacher.signal(batch, Needs(teacher_logits=True)).logits
        if logits is not None:
            said = {"teacher": logits.argmax(1).cpu()} | said
        draw(folder / "plots" / PICTURE, shown(batch, data), batch.targets.cpu(), said, data.class_names)


class Meter:
    """Streams over an evaluation set; kept is the confusion matrix alone. In a process group `compute` is a collective."""

    def __init__(self, class_names: Sequence[str], device: torch.device | str) -> None:
        self.class_names = class_names
        self._confusion = MulticlassConfusionMatrix(len(class_names), ignore_index=-1, validate_args=False).to(device)

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch: logits [B, C, H, W], targets [B, H, W] int64 with -1 where there is no label."""
        self._confusion.update(logits.argmax(1), targets)

    def compute(self) -> dict[str, float]:
        """The metrics by name, in percent. Raises `RunFailed` if no labelled pixel was seen."""
        matrix = self._confusion.compute().double()  # [truth, prediction]
        if not matrix.sum():
            raise RunFailed("the evaluation saw no labelled pixel: its data set is empty, or all of it is void")
        right, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        there = union > 0
        share = (100 * right / union).tolist()
        found = {"miou": float(100 * (right[there] / union[there]).mean()), "pixel_accuracy": float(100 * right.sum() / matrix.sum())}
        return found | {f"iou_{plain(n)}": v for n, v, t in zip(self.class_names, share, there.tolist(), strict=True) if t}


def plain(class_name: str) -> str:
    """A class's name as part of a metric's: small letters, digits and underscores."""
    return re.sub(r"\W+", "_", class_name.lower()).strip("_")


def shown(batch: Batch, data: Data) -> Tensor:
    """The inputs as pictures [B, H, W, 3] in [0, 1]; what is no photograph is stretched to its own range."""
    mean, std = (torch.tensor(v, device=batch.inputs.device).view(-1, 1, 1) for v in (data.mean, data.std))
    pixels = (batch.inputs * std + mean).cpu()
    if pixels.min() < -0.01 or pixels.max() > 1.01:
        low, high = pixels.flatten(1).quantile(torch.tensor([0.01, 0.99]), dim=1)[:, :, None, None, None]
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    return pixels.clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def draw(file: Path, images: Tensor, truth: Tensor, said: dict[str, Tensor], class_names: Sequence[str]) -> None:
    """One row for each image [B, H, W, 3]: the image, its truth, every prediction [B, H, W] by who said it; a legend of the classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colours = palette(len(class_names))
    columns: dict[str, Tensor] = {"image": images, "truth": colours[truth], **{who: colours[maps] for who, maps in said.items()}}
    height, width = images.shape[1:3]
    cell = 2.2 * max(1.0, width / height), 2.2 * max(1.0, height / width)
    size = cell[0] * len(columns), cell[1] * len(images) + 0.9
    figure, axes = pyplot.subplots(len(images), len(columns), figsize=size, squeeze=False, layout="constrained")
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(pictures[row].numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if title in said:
                axis.set_xlabel(_share_right(said[title][row], truth[row]), fontsize=8)
    shades: list[Any] = colours.tolist()
    names = [*class_names, *(["no label"] if (truth < 0).any() else [])]
    patches = [Patch(facecolor=shade, edgecolor="0.3", label=name) for name, shade in zip(names, shades, strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _share_right(prediction: Tensor, truth: Tensor) -> str:
    labelled = truth >= 0
    return f"{100 * float((prediction == truth)[labelled].float().mean()):.0f} % of pixels right" if labelled.any() else "no label"


def palette(classes: int) -> Tensor:
    """A colour for each class and, last, white for pixels without a label: float32 [classes + 1, 3] in [0, 1]."""
    from matplotlib import colormaps

    table: Any = colormaps["tab20"] if classes <= 20 else colormaps["gist_ncar"].resampled(classes)
    # tab20 lists each hue twice, dark and pale: all dark ones first, so that few classes look nothing alike.
    order = [*range(0, 20, 2), *range(1, 20, 2)] if classes <= 20 else range(classes)
    rows = [table(order[i])[:3] for i in range(classes)]
    return torch.tensor([*rows, (1.0, 1.0, 1.0)])
