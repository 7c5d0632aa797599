"""Samples in the plane as one picture: the true density, the teacher's samples, a generator's before and after its training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdrun.evaluation.sampler import true_rows
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Teacher

if TYPE_CHECKING:
    from kdrun.dataset.base import Data
    from kdrun.evaluation.sampler import Sampler

FILE = Path("plots") / "samples.png"
SHOWN = 1600  # points in a panel
# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#F0E442")


@torch.no_grad()
def draw(folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device, sampler: Sampler) -> None:
    """Write FILE into the folder. `sampler` says how networks are asked, and which label is to be forgotten."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    truth = _first(true_rows(data, device))
    panels = _panels(network, teacher, truth, sampler)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.4), layout="constrained", squeeze=False)
    reach = 1.6 * float(truth.extra["mode_centres"].abs().max())
    for axis, (title, points) in zip(axes[0], panels, strict=True):
        for label in range(data.classes):
            x, y = points[truth.targets == label].cpu().unbind(1)
            axis.scatter(x, y, s=5, alpha=0.5, linewidths=0, color=_colour(label), label=_asked(label, sampler))
        for (x, y), owner in zip(truth.extra["mode_centres"].tolist(), truth.extra["mode_classes"].tolist(), strict=True):
            axis.text(1.45 * x, 1.45 * y, str(owner), color=_colour(owner), ha="center", va="center", weight="bold")
        axis.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), markerscale=4, frameon=False)
    figure.suptitle("Points by the label they were asked for. Numbers: the class that owns each mode.", fontsize="medium")
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FILE, dpi=120)
    plt.close(figure)


def _panels(network: nn.Module, teacher: Teacher, truth: Batch, sampler: Sampler) -> list[tuple[str, Tensor]]:
    """(title, points [N, 2]) in the order of the tale."""
    panels = [("true density", truth.inputs)]
    phi = teacher.network if isinstance(teacher, LiveTeacher) else None
    if phi is not None:
        points, calls = sampler.draw(phi, truth)
        panels.append((f"teacher, {_calls(calls)}", points))
    if phi is not None and hasattr(network, "denoiser"):
        before = copy.deepcopy(network)
        before.denoiser.load_state_dict(phi.state_dict())  # type: ignore[union-attr]
        points, calls = sampler.draw(before, truth)
        panels.append((f"generator before training, {_calls(calls)}", points))
    points, calls = sampler.draw(network.eval(), truth)
    return [*panels, (f"generator after training, {_calls(calls)}", points)]


def _first(truth: Batch) -> Batch:
    """SHOWN of the rows: the classes alternate, so all are among them."""
    return truth._replace(inputs=truth.inputs[:SHOWN], targets=truth.targets[:SHOWN], ids=truth.ids[:SHOWN], view=truth.view[:SHOWN])


def _calls(calls: int) -> str:
    return f"{calls} call" + "s" * (calls != 1)


def _asked(label: int, sampler: Sampler) -> str:
    if label == sampler.forget:
        return f"label {label}, to be forgotten" + ("" if sampler.override is None else f" in favour of {sampler.override}")
    return f"label {label}"


def _colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]
