"""Evaluation of a language model on given texts: what it says of every scored token.

nll, perplexity     -log q(y), its mean over tokens and the exponential of that
top1, ece, entropy  share of tokens that are its first choice; calibration of that choice (Guo et al., ICML 2017); -sum q log q
agreement, kl_teacher, rkl_teacher     first choices in common with the teacher; KL(p || q) and KL(q || p), p the teacher
kl_truth, rkl_truth, agreement_truth   the same against the exact distribution, in worlds that know it ("truth_logits")
head_mass, tail_mass    the mass of its own 5 largest probabilities, and of its smallest fifth (as TAID's Table 3 looks at them)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from kdrun.dataset.base import Data
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.base import Evaluation, Rows
from kdrun.evaluation.calibration import CalibrationError, confidence_and_hits
from kdrun.losses.divergence import kl_between
from kdrun.student.taps import ask, reads_tokens
from kdrun.types import Teacher

TRUTH = "truth_logits"
HEAD, TAIL = 5, 0.2  # tokens of the head; share of the vocabulary in the tail (TAID's world: 8 of 40)
AT_ONCE = 2**24  # logits that are looked at together
OWN = ("nll", "top1", "ece", "entropy", "head_mass", "tail_mass")
BESIDE_TEACHER = ("agreement", "kl_teacher", "rkl_teacher")
BESIDE_TRUTH = ("kl_truth", "rkl_truth", "agreement_truth", "truth_entropy")
PERCENT = ("top1", "agreement", "agreement_truth")
SAMPLES = "samples.jsonl"


@dataclass(eq=False)
class Language(Evaluation):
    """What is measured, how often, and which epoch's number is reported. Raises `Refused` for a field outside its range."""

    primary: str = "nll"
    bins: int = 15  # Guo et al., Table 1
    examples: int = 4  # test rows whose most likely tokens are written beside the true ones; 0: none

    def own_problems(self) -> list[Problem]:
        return [
            Problem(f"must be at least {low}, not {getattr(self, name)}", f"evaluation.{name}", "", f"e.g. evaluation.{name}={example}")
            for name, low, example in (("bins", 1, 15), ("examples", 0, 4))
            if getattr(self, name) < low
        ]

    def problems(self, data: Data) -> list[Problem]:
        if data.vocabulary is not None:
            return []
        return [Problem(f"{data.name} is no text", "evaluation", data.name, "evaluation=classification")]

    def names(self, classes: int | None = None) -> list[str]:
        return [*OWN, "perplexity", *BESIDE_TEACHER, *BESIDE_TRUTH]

    def meter(self, classes: int, device: torch.device | str) -> TokenMeter:
        return TokenMeter(self.bins, torch.device(device))

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        meter = self.meter(data.classes, device)
        for batch, said in rows:
            meter.update(ask(network, batch), batch.targets, said, batch.extra.get(TRUTH))
        return meter.compute()

    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """Some test rows, what came and what the student held most likely at each place, as text: samples.jsonl."""
        if not self.examples or data.vocabulary is None or not reads_tokens(network):
            return
        batch = next(data.batches("test", self.examples, device))
        was = network.training
        network.eval()
        with torch.inference_mode():
            choices = ask(network, batch).argmax(-1)
        network.train(was)
        lines = []
        for inputs, targets, chosen in zip(batch.inputs.tolist(), batch.targets.tolist(), choices.tolist(), strict=True):
            first = next((i for i, y in enumerate(targets) if y >= 0), 0)
            told = [i for i, y in enumerate(targets) if y >= 0]
            decode = data.vocabulary.decode
            row = {
                "prompt": decode(inputs[: first + 1]),
                "text": decode([targets[i] for i in told]),
                "student": decode([chosen[i] for i in told]),
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        (folder / SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")


class TokenMeter:
    """Streams over texts: sums over scored tokens stay on the device. In a process group `compute` is a collective."""

    def __init__(self, bins: int, device: torch.device) -> None:
        self._calibration = CalibrationError(bins).to(device)
        self._sums = _Sums().to(device)

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None, truth: Tensor | None = None) -> None:
        """Add a batch: logits [B, T, V], targets [B, T] (-1: not scored), the teacher's and true logits [B, T, V] if there are any."""
        scored = targets >= 0
        for part in _parts(scored, logits.shape[-1]):
            take = lambda values: None if values is None else values[part].float()  # noqa: B023, E731
            own, y = take(logits), targets[part]
            assert own is not None
            self._calibration.update(*confidence_and_hits(own.softmax(-1), y))
            self._sums.update(own, y, take(teacher_logits), take(truth))

    def compute(self) -> dict[str, float]:
        """The metrics by name. Raises `RunFailed` where no token was scored."""
        found = self._sums.compute()
        if not found:
            raise RunFailed("the evaluation saw no scored token")
        nll = found["nll"]
        found["ece"] = math.nan if math.isnan(nll) else 100 * float(self._calibration.compute())
        return {**found, "perplexity": math.exp(min(nll, 700.0))}


def _parts(scored: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The scored places (row, column) of a batch, so many at once that their logits stay small."""
    rows, columns = scored.nonzero(as_tuple=True)
    at_once = max(1, AT_ONCE // vocabulary)
    yield from zip(rows.split(at_once), columns.split(at_once), strict=True)


class _Sums(Metric):
    """The sums behind every mean, float64, reduced over ranks at once."""

    higher_is_better = None
    full_state_update = False
    total: Tensor
    NAMES = tuple(n for n in (*OWN, *BESIDE_TEACHER, *BESIDE_TRUTH) if n != "ece")
    COUNTS = ("tokens", "with_teacher", "with_truth")

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(self.NAMES) + len(self.COUNTS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, teacher: Tensor | None, truth: Tensor | None) -> None:
        """Rows of scored tokens: logits [N, V], targets [N]."""
        log_q = F.log_softmax(logits, -1)
        q = log_q.exp()
        choice, ordered = q.argmax(-1), q.sort(-1).values
        tail = round(TAIL * q.shape[-1])
        rows: dict[str, Tensor] = {
            "nll": -log_q.gather(-1, targets[:, None])[:, 0],
            "top1": choice == targets,
            "entropy": -torch.special.xlogy(q, q).sum(-1),
            "head_mass": ordered[:, -HEAD:].sum(-1),
            "tail_mass": ordered[:, :tail].sum(-1),
            "tokens": torch.ones_like(targets),
        }
        if teacher is not None:
            log_p = F.log_softmax(teacher, -1)
            rows |= {
                "agreement": log_p.argmax(-1) == choice,
                "kl_teacher": kl_between(log_p, log_q),
                "rkl_teacher": kl_between(log_q, log_p),
            }
            rows["with_teacher"] = rows["tokens"]
        if truth is not None:
            log_o = F.log_softmax(truth, -1)
            rows |= {
                "agreement_truth": log_o.argmax(-1) == choice,
                "kl_truth": kl_between(log_o, log_q),
                "rkl_truth": kl_between(log_q, log_o),
            }
            rows |= {"truth_entropy": torch.special.entr(log_o.exp()).sum(-1), "with_truth": rows["tokens"]}
        nothing = torch.zeros((), dtype=torch.float64, device=logits.device)
        added = [rows[n].sum(dtype=torch.float64) if n in rows else nothing for n in (*self.NAMES, *self.COUNTS)]
        self.total = self.total + torch.stack(added)

    def compute(self) -> dict[str, float]:
        """Means; those that need a teacher or the truth are absent without one. {} if no token was scored."""
        values: dict[str, Any] = dict(zip((*self.NAMES, *self.COUNTS), self.total.tolist(), strict=True))
        divisors = dict.fromkeys(self.NAMES, values["tokens"])
        divisors |= dict.fromkeys(BESIDE_TEACHER, values["with_teacher"]) | dict.fromkeys(BESIDE_TRUTH, values["with_truth"])
        return {n: values[n] / d * (100 if n in PERCENT else 1) for n, d in divisors.items() if d}
