"""Evaluation of a classifier: accuracy, calibration, and fidelity to the teacher.

Calibration error and selective risk: `kdrun.evaluation.calibration`.
Agreement and KL to the teacher: Stanton et al., "Does Knowledge Distillation Really Work?", NeurIPS 2021,
arXiv 2106.05945, eqs. 5 and 6 (the KL here is teacher first, the direction that distillation minimises).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused, RunFailed
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.evaluation.breakdown import Breakdown, Sums
from kdrun.evaluation.calibration import CalibrationError, SelectiveRisk, confidence_and_hits
from kdrun.student.taps import ask


@dataclass(eq=False)
class Classification(Evaluation):
    """What is measured of a classifier, how often, and which epoch's number is reported.

    Raises `Refused` for a field outside its range; `meter` does so for what only the class count shows.
    """

    top_k: tuple[int, ...] = (1, 5)  # a k that is not below the class count is skipped
    bins: int = 15  # Guo et al., table 1
    pair_order: bool = False
    aurc: bool = False

    def own_problems(self) -> list[Problem]:
        self.top_k = tuple(sorted(set(self.top_k)))
        problems = []
        if self.bins < 1:
            problems.append(Problem(f"must be at least 1, not {self.bins}", "evaluation.bins", "", "e.g. evaluation.bins=15"))
        if not self.top_k or self.top_k[0] < 1:
            what = f"needs whole numbers of at least 1, not {list(self.top_k)}"
            problems.append(Problem(what, "evaluation.top_k", "", "e.g. evaluation.top_k=[1,5]"))
        return problems

    def problems(self, data: Data) -> list[Problem]:
        fitting = "graph" if data.whole else "segmentation" if data.split("train").targets.ndim > 1 else None
        fitting = "language" if data.vocabulary is not None else fitting
        if fitting is None or type(self) is not Classification:
            return []
        of = {"graph": "the nodes of a graph, not all of them labelled", "segmentation": "pixels", "language": "tokens"}[fitting]
        return [Problem(f"{data.name} has labels of {of}", "evaluation", data.name, f"evaluation={fitting}")]

    def names(self, classes: int | None = None) -> list[str]:
        """The metrics that a meter for so many classes returns, those that need a teacher's logits included."""
        ranks = [k for k in self.top_k if classes is None or k < classes]
        # Two classes leave one that is not the target, hence no pair of them.
        pairs = ["pair_order"] if self.pair_order and (classes is None or classes > 2) else []
        risks = ["aurc", "e_aurc"] if self.aurc else []
        return [*(f"top{k}" for k in ranks), "nll", "ece", *risks, "agreement", "kl_teacher", "teacher_top1", *pairs]

    def meter(self, classes: int, device: torch.device | str) -> Meter:
        """A fresh meter for logits [B, classes]. Raises `Refused` if so few classes leave the primary metric unmeasured."""
        names = self.names(classes)
        if self.primary not in names:
            what = f"'{self.primary}' says nothing with {classes} classes"
            raise Refused(Problem(what, "evaluation.primary", "", f"evaluation.primary={names[0]}"))
        ranks = [k for k in self.top_k if k < classes]
        return Meter(classes, ranks, self.bins, "pair_order" in names, self.aurc, torch.device(device))

    def breakdown(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> Sums:
        found = Breakdown(data.classes, self.bins, device)
        for batch, said in rows:
            found.update(ask(network, batch), batch.targets, said)
        return found.sums()


class Meter:
    """Streams over an evaluation set: sums stay on the device, no update waits for it, no logits are kept.

    Kept are sums and, for the selective risk, two numbers per sample. In a process group `compute` is a collective:
    every rank calls it, and each gets the result over all ranks' samples.
    """

    def __init__(self, classes: int, top_k: list[int], bins: int, pair_order: bool, aurc: bool, device: torch.device) -> None:
        self._accuracy = {
            # validate_args=False: the validation reads values back from the device on every update.
            f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False).to(device)
            for k in top_k
        }
        self._calibration = CalibrationError(bins).to(device)
        self._risk = SelectiveRisk().to(device) if aurc else None
        self._sums = _Sums(pair_order).to(device)

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch: logits [B, C] of any floating dtype, targets [B] int64, the teacher's logits [B, C] if there is one."""
        logits = _wide(logits)
        for accuracy in self._accuracy.values():
            accuracy.update(logits, targets)
        rows = confidence_and_hits(logits.softmax(dim=1), targets)
        self._calibration.update(*rows)
        if self._risk is not None:
            self._risk.update(*rows)
        self._sums.update(logits, targets, None if teacher_logits is None else _wide(teacher_logits))

    def compute(self) -> dict[str, float]:
        """The metrics by name: top-k, ece, agreement, teacher_top1 and pair_order in percent, nll and kl_teacher in nats, aurc and e_aurc
        in thousandths.

        Those that need a teacher are means over the samples that came with its logits, and absent if none did.
        Raises `RunFailed` if no sample was seen.
        """
        with warnings.catch_warnings():
            # A rank without a share of the samples is no fault; that nobody has one is found below.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            return self._compute()

    def _compute(self) -> dict[str, float]:
        sums = self._sums.compute().tolist()
        count, with_teacher = sums[_COUNT], sums[_WITH_TEACHER]
        if not count:
            raise RunFailed("the evaluation saw no sample: its data set is empty")
        # torchmetrics divides in float32; the number of hits behind the ratio is whole, so it is recovered exactly.
        found = {name: 100 * round(float(accuracy.compute()) * count) / count for name, accuracy in self._accuracy.items()}
        found["nll"] = sums[_NLL] / count
        # Logits that are not numbers fall into a bin like any other, and would pass for calibrated.
        diverged = math.isnan(found["nll"])
        found["ece"] = math.nan if diverged else 100 * float(self._calibration.compute())
        if self._risk is not None:
            found["aurc"], found["e_aurc"] = (math.nan, math.nan) if diverged else (1000 * float(r) for r in self._risk.compute())
        if with_teacher:
            found["agreement"] = 100 * sums[_AGREEMENT] / with_teacher
            found["kl_teacher"] = sums[_KL_TEACHER] / with_teacher
            found["teacher_top1"] = 100 * sums[_TEACHER_TOP1] / with_teacher
            if self._sums.pair_order:
                found["pair_order"] = 100 * sums[_PAIR_ORDER] / with_teacher
        return found


_COUNT, _NLL, _WITH_TEACHER, _AGREEMENT, _KL_TEACHER, _TEACHER_TOP1, _PAIR_ORDER = range(7)


class _Sums(Metric):
    """The sums behind every mean, as one float64 vector that is reduced over ranks at once."""

    higher_is_better = None
    full_state_update = False
    total: Tensor

    def __init__(self, pair_order: bool) -> None:
        super().__init__()
        self.pair_order = pair_order
        self.add_state("total", torch.zeros(7, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> None:
        rows = [torch.ones_like(logits[:, 0]), F.cross_entropy(logits, targets, reduction="none")]
        if teacher_logits is not None:
            choice = teacher_logits.argmax(dim=1)
            rows += [rows[0], choice == logits.argmax(dim=1), kl_to_teacher(logits, teacher_logits), choice == targets]
            if self.pair_order:
                rows.append(pair_order_share(logits, teacher_logits, targets))
        added = torch.stack([row.sum(dtype=torch.float64) for row in rows])
        self.total = self.total + F.pad(added, (0, len(self.total) - len(added)))

    def compute(self) -> Tensor:
        return self.total


def _wide(logits: Tensor) -> Tensor:
    """At least float32, whatever the model spoke in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl_to_teacher(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1 of each sample, [B, C], [B, C] -> [B], in nats.

    A class that the teacher excludes (logit -inf) adds nothing, as lim p log p = 0. Infinite only where the student
    excludes a class that the teacher does not.
    """
    log_student, log_teacher = logits.log_softmax(dim=1), teacher_logits.log_softmax(dim=1)
    teacher = log_teacher.exp()
    return torch.where(teacher > 0, teacher * (log_teacher - log_student), 0).sum(dim=1)


def pair_order_share(logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """The share of pairs of non-target classes that the student ranks as the teacher, of each sample, in [0, 1].

    Shapes [B, C], [B, C], [B] -> [B]; C must be at least 3. A pair that either of them ties counts half, so that the
    value is (1 + Kendall's tau-a) / 2 and 1/2 is chance. Time O(B C^2), memory O(B C).
    """
    classes = logits.shape[1]
    others = torch.arange(classes - 1, device=logits.device)
    index = others + (others >= targets[:, None])
    student, teacher = _ranks(logits.gather(1, index)), _ranks(teacher_logits.gather(1, index))
    balance = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)  # concordant minus discordant pairs
    for apart in range(1, classes - 1):
        # All pairs of entries so far apart, at once: the C x C comparisons of a sample never exist together.
        gaps = (student[:, apart:] - student[:, :-apart]) * (teacher[:, apart:] - teacher[:, :-apart])
        balance += gaps.sign_().sum(dim=1)
    return 0.5 + 0.5 * balance / math.comb(classes - 1, 2)


def _ranks(logits: Tensor) -> Tensor:
    """[B, K] -> [B, K] float32, equal for equal logits. Their differences are finite where those of -inf logits are not."""
    return torch.searchsorted(logits.sort(dim=1).values, logits).to(torch.float32)
