"""What moves the student: the gradient of each weighted term at its logits, asked for beside a training step and never part of it.

A pass of its own over the step's batches, without a gradient through the networks. It draws from the same random state as the step, puts
the random state and the networks' buffers back, and leaves no gradient: a run with it is bit-equal to one without.

    share of a term      ||w_i g_i|| / sum_j ||w_j g_j||        g_i: the gradient of term i, per item, at the logits of the whole step
    cosine of two terms  <g_i, g_j> / (||g_i|| ||g_j||)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.engine import shard
from kdrun.engine.loop import Stage
from kdrun.engine.records import DIAGNOSTICS, read_lines
from kdrun.engine.report import Reporter
from kdrun.strict_json import to_json
from kdrun.types import Batch, Signal, Term

RARE = 0.01  # a term with less of the gradient hardly counts, and one with all but this counts alone
CROSS_ENTROPY = "ce"  # the term whose value at chance is known: ln C


class Diagnosis:
    """Looks at the terms of a logged step before the step is made, and writes a line of diagnostics.jsonl."""

    def __init__(self, folder: Path, reporter: Reporter, steps_per_epoch: int, active: bool) -> None:
        self.file, self.reporter, self.steps_per_epoch, self.active = folder / DIAGNOSTICS, reporter, steps_per_epoch, active
        self.last: dict[str, Any] = {}
        self._silent = False  # it has been said why nothing can be told
        self._warned: set[tuple[str, ...]] = set()

    def cut(self, step: int) -> None:
        """Keep what was written up to a step: a resumed run writes the rest anew."""
        if self.active and self.file.exists():
            kept = [line for line in read_lines(self.file) if line["step"] <= step]
            self.file.write_text("".join(to_json(line) + "\n" for line in kept), encoding="utf-8")

    def __call__(
        self,
        stage: Stage,
        phase: str,
        group: Sequence[Batch],
        signals: Sequence[Signal],
        weights: Mapping[str, float],
        counts: Mapping[str, Tensor],
    ) -> None:
        if self._silent:
            return
        step = stage.step + 1
        record: dict[str, Any] = {"stage": stage.name, "step": step, "epoch": round(step / self.steps_per_epoch, 4)}
        reason = unfit(stage)
        if reason is None:
            found = look(stage, phase, group, signals, weights, counts)
            reason, told = (found, {}) if isinstance(found, str) else (None, found)
            record |= told
        if reason is not None:
            self._silent = True
            record["reason"] = f"the terms cannot be laid side by side at the logits: {reason}"
            self.reporter.note(f"run.diagnose: {record['reason']}")
        self._warn(record)
        self.last = record
        if self.active:
            with open(self.file, "a", encoding="utf-8") as handle:
                handle.write(to_json(record) + "\n")

    def _warn(self, record: dict[str, Any]) -> None:
        """Say it once for each term; the file has it at every step."""
        for text, about in warnings_of(record.get("terms", {})):
            record.setdefault("warnings", []).append(text)
            if about not in self._warned:
                self._warned.add(about)
                self.reporter.note(f"{record['stage']} step {record['step']}: {text}")


def unfit(stage: Stage) -> str | None:
    """Why the terms of a stage cannot be taken apart, None where they can."""
    if len(stage.objective.phases) > 1:
        return "the objective has several phases, each with terms and parameters of its own"
    if shard.is_sharded(stage.learner):
        return "the student is sharded"
    if stage.objective.coupling == "batch" and stage.ranks.world > 1:
        return "the objective compares samples of several ranks"
    return None


def look(
    stage: Stage, phase: str, group: Sequence[Batch], signals: Sequence[Signal], weights: Mapping[str, float], counts: Mapping[str, Tensor]
) -> dict[str, Any] | str:
    """Terms, shares, cosines and agreement of one step over all micro-batches and ranks; a text where the objective does not let one."""
    autocast = torch.autocast(stage.device.type, stage.autocast) if stage.autocast else nullcontext()
    values: dict[str, Tensor] = {}
    grams, alike = [], []
    with untouched(stage.learner, stage.device):
        for i, (batch, signal) in enumerate(zip(group, signals, strict=True)):
            torch.manual_seed(rng.key(stage.seed, "forward", stage.name, stage.step, phase, i, stage.ranks.rank))  # as the loop does
            ear = _Ear(stage.learner.student)
            with autocast:
                terms, _ = stage.objective.compute(ear, batch, signal, phase, stage.learner.connectors, None)
            if len(ear.heard) != 1:
                return _unheard(len(ear.heard))
            for name, term in terms.items():
                values[name] = values.get(name, 0.0) + (term.sum.detach() / counts[term.unit]).double()
            grams.append(gram(ear.heard[0], terms, weights, counts))
            alike.append(_agreement(ear.heard[0].detach(), signal, batch.targets))
    names = list(values)
    # A micro-batch without an item of a term (no label in it) adds nothing to that term.
    total = stage.ranks.sum(torch.stack(grams).nansum(0)).cpu()
    reach = stage.ranks.sum(torch.stack([(g.diagonal() >= 0).double() for g in grams]).sum(0)).cpu()
    told = stage.ranks.sum(torch.stack([values[name] for name in names])).tolist()
    same, rows = stage.ranks.sum(torch.stack(alike).sum(0)).tolist()
    record = {"terms": _shares(names, told, weights, total, reach), "cosines": _cosines(names, total, reach)}
    return record | ({"agreement": 100 * same / rows} if rows else {})


def gram(logits: Tensor, terms: Mapping[str, Term], weights: Mapping[str, float], counts: Mapping[str, Tensor]) -> Tensor:
    """<w_i g_i, w_j g_j> of all pairs of terms, [T, T] float64; they add up over micro-batches and ranks. NaN where a term does not depend
    on the logits, or is switched off."""
    gradients: list[Tensor | None] = []
    for name, term in terms.items():
        found = None
        if weights[name] != 0 and term.sum.requires_grad:
            (found,) = torch.autograd.grad(term.sum, logits, retain_graph=True, allow_unused=True)
        gradients.append(None if found is None else (weights[name] / counts[term.unit]).double() * found.double())
    table = logits.new_full((len(gradients), len(gradients)), math.nan, dtype=torch.float64)
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(gradients), 2):
        if a is not None and b is not None:
            table[i, j] = table[j, i] = (a * b).sum()
    return table


def _shares(names: Sequence[str], values: Sequence[float], weights: Mapping[str, float], total: Tensor, reach: Tensor) -> dict[str, Any]:
    """Every term: its value per item, its weight, and, where it depends on the logits, its norm there and its share of all norms."""
    norms = {name: math.sqrt(max(0.0, float(total[i, i]))) for i, name in enumerate(names) if reach[i] > 0}
    whole = sum(norms.values())
    found: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        found[name] = {"value": value, "weight": weights[name]}
        if name in norms:
            found[name] |= {"norm": norms[name], "share": norms[name] / whole if whole else None}
    return found


def _cosines(names: Sequence[str], total: Tensor, reach: Tensor) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        if reach[i] > 0 and reach[j] > 0:
            size = math.sqrt(float(total[i, i]) * float(total[j, j]))
            found[f"{a}|{b}"] = float(total[i, j]) / size if size else None
    return found


def warnings_of(terms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """What is worth a word in the shares of one step, and what each word is about."""
    shares = {name: term["share"] for name, term in terms.items() if term.get("share") is not None}
    if len(shares) < 2:
        return []
    alone = [name for name, share in shares.items() if share > 1 - RARE]
    if alone:
        return [
            (
                f"{alone[0]} has {100 * shares[alone[0]]:.1f} % of the gradient at the logits: the other terms hardly count",
                ("alone", alone[0]),
            )
        ]
    weak = [name for name, share in shares.items() if share < RARE]
    return [(f"{name} has {100 * shares[name]:.2g} % of the gradient at the logits: it hardly counts", ("weak", name)) for name in weak]


def first_step(name: str, terms: Mapping[str, float], weights: Mapping[str, float], classes: int, diagnosed: Mapping[str, Any]) -> str:
    """One line about the losses before the first update, for whoever wonders whether their sizes make sense.

    "student step 0: ce 4.61 (chance level ln 100 = 4.61), kd 15.3 x weight 0.9 = 13.8; kd has 92 % of the gradient at the logits"
    """
    parts = []
    for term, value in terms.items():
        chance = f" (chance level ln {classes} = {math.log(classes):.2f})" if term == CROSS_ENTROPY and classes > 1 else ""
        weight = weights.get(term, 1.0)
        product = "" if weight == 1 else " x weight 0" if weight == 0 else f" x weight {weight:.3g} = {weight * value:.3g}"
        parts.append(f"{term} {value:.3g}{chance}{product}")
    shares = {term: told["share"] for term, told in diagnosed.get("terms", {}).items() if told.get("share") is not None}
    largest = max(shares, key=lambda term: shares[term], default=None)
    said = f"; {largest} has {100 * shares[largest]:.0f} % of the gradient at the logits" if largest is not None and len(shares) > 1 else ""
    return f"{name} step 0: {', '.join(parts)}{said}"


class _Ear:
    """The student as an objective calls it, without a gradient through it; keeps the logits that it said, which ask for one."""

    def __init__(self, student: Any) -> None:
        self.student = student
        self.heard: list[Tensor] = []

    def __call__(self, inputs: Tensor, extra: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            logits, taps = self.student(inputs, extra)
        self.heard.append(logits.detach().requires_grad_())
        return self.heard[-1], {name: value.detach() for name, value in taps.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.student, name)


def _unheard(calls: int) -> str:
    if calls == 0:
        return "the objective never holds the student's logits as one tensor"
    return f"the objective asks the student {calls} times in a step"


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back what a forward pass moves: buffers such as the statistics of BatchNorm, and the random state."""
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in before:
                        buffer.copy_(before[name])


def _agreement(logits: Tensor, signal: Signal, targets: Tensor) -> Tensor:
    """(rows where student and teacher choose the same class, rows), float64; (0, 0) where either does not choose among classes."""
    nothing = torch.zeros(2, dtype=torch.float64, device=logits.device)
    classes = -1 if logits.ndim == 3 else 1  # [B, T, V] of texts, else [B, C] or [B, C, H, W]
    if logits.ndim < 2 or targets.is_floating_point():
        return nothing
    choice = logits.argmax(classes)
    if signal.kept is not None:
        theirs = signal.kept.ids.gather(-1, signal.kept.log_probs.argmax(-1, keepdim=True)).squeeze(-1)
    elif signal.logits is not None and signal.logits.shape == logits.shape:
        theirs = signal.logits.argmax(classes)
    else:
        return nothing
    if theirs.shape != choice.shape:
        return nothing
    # Rows without a label (padding, void) are no choices; labels of mixed images are, though of another shape.
    counted = targets >= 0 if targets.shape == choice.shape else torch.ones_like(choice, dtype=torch.bool)
    return torch.stack([((choice == theirs) & counted).sum(), counted.sum()]).double()
