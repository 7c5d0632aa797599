"""Evaluation of a conditional sampler against a known density, after a class was to be forgotten.

The data set knows its modes and which class owns each (`kdrun.dataset.modes`), so a sample's class is that of the nearest
mode. The network is a one-step generator, asked once per sample, or a noise predictor, asked `calls` times by DDIM.

Unlearning accuracy (UA) is 1 minus the accuracy of a classifier on samples that were asked for by the forgotten label: SFD
(ICLR 2025, arXiv 2409.11219), which has a trained classifier where here the known modes decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.errors import Problem, Refused
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.student.denoiser import schedule_of
from kdrun.student.generator import Solver, ddim, solve
from kdrun.types import Batch, Teacher

if TYPE_CHECKING:
    from kdrun.dataset.base import Data

METRICS = ("ua", "override_rate", "kept_accuracy", "kept_sw", "mode_balance", "calls")
KNOWN = ("mode_centres", "mode_classes")  # what the data set must say of its world
AT_ONCE = 8000  # samples in one network call


@dataclass(eq=False)
class Sampler(Evaluation):
    """One sample for each row of the test split, asked for by the row's label; the rows are the fresh true samples.

    ua: samples asked for by `forget` that are of another class; override_rate: that are of the class `override`; kept_accuracy:
    samples of the other labels that are of their class (percent). kept_sw: sliced Wasserstein-1 distance to the true samples,
    mean over the kept classes, in units of the data. mode_balance: share of the rarest mode among a kept class's samples at its
    own modes, mean over these classes; the world's own is 100 over the modes of a class (percent). calls: network calls for a
    sample.
    """

    primary: str = "ua"
    forget: int = 0
    override: int | None = 1
    calls: int = 40
    directions: int = 32
    seed: int = 0

    def own_problems(self) -> list[Problem]:
        return [
            Problem(f"must be at least 1, not {getattr(self, name)}", f"evaluation.{name}", "", f"e.g. evaluation.{name}={example}")
            for name, example in (("calls", 40), ("directions", 32))
            if getattr(self, name) < 1
        ]

    def names(self, classes: int | None = None) -> list[str]:
        return [name for name in METRICS if name != "override_rate" or self.override is not None]

    @torch.no_grad()
    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        """The metrics; all NaN where a sample is not finite. `rows` is not asked: the truth is the test split's.

        Raises:
            Refused: a data set whose modes are not known, a network that does not say what it takes, a label that there is not.
        """
        truth = true_rows(data, device)
        samples, calls = self.draw(network, truth)
        if not samples.isfinite().all():
            return dict.fromkeys(self.names(), math.nan)
        found = self._metrics(samples, truth) | {"calls": float(calls)}
        return {name: found[name] for name in self.names()}

    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """`plots/samples.png`: the true density, the teacher's samples and the student's."""
        from kdrun.evaluation.pictures_2d import draw

        draw(folder, network, teacher, data, device, self)

    def draw(self, network: nn.Module, truth: Batch) -> tuple[Tensor, int]:
        """(samples [N, ...], network calls for each) for the labels of `truth`; the same latents for every network."""
        z = rng.normal(rng.key(self.seed, "sampler"), tuple(truth.inputs.shape[1:]), truth.ids)
        drawn = [sample(network, part, c, self.calls) for part, c in zip(z.split(AT_ONCE), truth.targets.split(AT_ONCE), strict=True)]
        return torch.cat([x for x, _ in drawn]), drawn[0][1]

    def _metrics(self, samples: Tensor, truth: Batch) -> dict[str, float]:
        labels, classes = truth.targets, truth.extra["mode_classes"]
        kept = [int(c) for c in classes.unique() if c != self.forget]
        if len(kept) == len(classes.unique()) or not kept:
            raise Refused(Problem(f"there is no label {self.forget}", "evaluation.forget", "", f"one of {kept}"))
        mode = torch.cdist(samples, truth.extra["mode_centres"]).argmin(dim=1)
        found, forgotten = classes[mode], labels == self.forget
        distances, balances = [], []
        for c in kept:
            mine = labels == c
            distances.append(sliced_wasserstein(samples[mine], truth.inputs[mine], self.directions))
            counts = torch.stack([(mode[mine] == m).sum() for m in (classes == c).nonzero()[:, 0]])
            balances.append(counts.min() / counts.sum().clamp(min=1))
        return {
            "ua": _percent(found[forgotten] != self.forget),
            "override_rate": _percent(found[forgotten] == (-1 if self.override is None else self.override)),
            "kept_accuracy": _percent((found == labels)[~forgotten]),
            "kept_sw": float(torch.stack(distances).mean()),
            "mode_balance": 100 * float(torch.stack(balances).mean()),
        }


def sample(network: nn.Module, z: Tensor, labels: Tensor, calls: int, solver: Solver = "DDIMScheduler") -> tuple[Tensor, int]:
    """(samples float32 shaped as z [B, ...], network calls): one for a generator, `calls` for a noise predictor.

    A noise predictor of images is asked by `solver`, the others by DDIM.

    Raises `Refused` for a network that is neither.
    """
    takes = tuple(getattr(network, "takes", ()))
    if takes == ("labels",):
        return network(z, labels=labels).float(), 1
    if takes == ("labels", "t") and hasattr(network, "scheduler"):
        return solve(network, solver, z, labels, calls).float(), calls
    schedule = schedule_of(network)
    if takes == ("labels", "t") and schedule is not None:
        return ddim(network, schedule, z, labels, calls).float(), calls
    what = f"{type(network).__name__} is no conditional sampler: its forward takes {', '.join(takes) or 'nothing'} beside its input"
    raise Refused(Problem(what, "student", "", "a network such as student=generator_mlp or student=denoiser_mlp"))


def true_rows(data: Data, device: torch.device | str) -> Batch:
    """The test split as one batch. Raises `Refused` where the data set does not know its modes."""
    split = data.split("test")
    missing = [name for name in KNOWN if name not in split.constants]
    if missing:
        what = f"{data.name} does not say where its modes are: {', '.join(missing)}"
        raise Refused(Problem(what, "evaluation", data.name, "a world whose density is known: dataset=modes"))
    return next(data.batches("test", len(split), device))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int) -> Tensor:
    """Mean over directions of the Wasserstein-1 distance of the projections: the mean absolute difference of sorted ones.

    a, b [N, 2], as many points each -> scalar. Directions are equally spaced over half a turn; the others only mirror them.
    """
    angles = math.pi * torch.arange(directions, dtype=torch.float64, device=a.device) / directions
    onto = torch.stack([angles.cos(), angles.sin()])
    return ((a.double() @ onto).sort(dim=0).values - (b.double() @ onto).sort(dim=0).values).abs().mean()


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())
