"""Evaluation of a network on a split, beside its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.engine.distributed import Ranks
from kdrun.evaluation.breakdown import to_document
from kdrun.student.taps import reads_tokens
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.silent import NoTeacher
from kdrun.types import Batch, Needs, Teacher

BATCH = 500
ELEMENTS = 2**24  # of the inputs of one forward pass: fewer rows at once where they are large
KEPT = 2**28  # logits of a teacher on a split that are kept: 1 GiB
LOGITS = Needs(teacher_logits=True)


class Evaluator:
    """Measures networks; what the teacher says of a split is computed once and kept.

    Under several ranks each takes its share of a split, and all of them must call: the metrics are added up over ranks.
    """

    def __init__(self, data: Data, evaluation: Any, teacher: Teacher, device: torch.device, ranks: Ranks) -> None:
        self.data, self.evaluation, self.teacher = data, evaluation, teacher
        self.device, self.ranks = device, ranks
        self._said: dict[str, list[Tensor]] = {}
        self.reads: dict[str, int] = {}  # how often each split was looked at

    def splits(self) -> list[str]:
        return [s for s in ("validation", "test") if s in self.data.splits]

    @torch.inference_mode()
    def measure(self, network: nn.Module, split: str) -> dict[str, float]:
        """Metrics of a network in evaluation mode; its mode is restored."""
        was = network.training
        network.eval()
        found = self.evaluation.measure(network, self._rows(split), self.data, self.device)
        network.train(was)
        self.reads[split] = self.reads.get(split, 0) + 1
        return dict(found)

    @torch.inference_mode()
    def breakdown(self, network: nn.Module, split: str) -> dict[str, Any]:
        """How right a network is by class and by confidence (`kdrun.evaluation.breakdown`); {} where the evaluation does not tell.
        A collective. It is asked once, of weights that were measured before, and counts as no further look at the split."""
        was = network.training
        network.eval()
        found = self.evaluation.breakdown(network, self._rows(split), self.data, self.device)
        network.train(was)
        sums = {name: self.ranks.sum(value) for name, value in found.items()}
        return {"split": split, **to_document(sums, self.data.class_names)} if sums else {}

    def batches(self, split: str) -> Iterator[Batch]:
        """This rank's rows of a split, in order, as evaluated."""
        size = len(self.data.split(split))
        # What is said of a token is larger than the token.
        wide = self.data.classes if self.data.vocabulary is not None and not self.evaluation.writes else 1
        at_once = max(1, min(BATCH, ELEMENTS // max(1, wide * math.prod(self.data.input_shape))))
        # No rank is to be left without: metrics that keep rows cannot be gathered from one that has none.
        at_once = min(at_once, max(1, -(-size // self.ranks.world)))
        pieces = torch.arange(size).split(size if self.data.whole else at_once)[self.ranks.rank :: self.ranks.world]
        return self.data.stream(split, ((index, torch.zeros_like(index)) for index in pieces), seed=0, augment=False, device=self.device)

    def measure_all(self, network: nn.Module) -> dict[str, dict[str, float]]:
        return {split: self.measure(network, split) for split in self.splits()}

    def _rows(self, split: str) -> Iterator[tuple[Batch, Tensor | None]]:
        spec, rows = self.teacher.spec, len(self.data.split(split))
        if spec is not None and rows * math.prod(spec.output or (spec.classes,)) > KEPT:
            # Of every token of a large vocabulary: said anew each time.
            for batch in self.batches(split):
                yield batch, self.teacher.signal(batch, LOGITS).logits if self._asks() else None
            return
        said = self._teacher_logits(split)
        for i, batch in enumerate(self.batches(split)):
            yield batch, said[i].to(self.device) if said else None

    def _asks(self) -> bool:
        # What is said of other tokens cannot be laid beside.
        alike = self.data.translated is None
        return self.evaluation.uses_teacher and self.teacher.spec is not None and not self.teacher.follows and alike

    def _teacher_logits(self, split: str) -> list[Tensor]:
        if not self._asks():
            return []
        if split not in self._said:
            signals = (self.teacher.signal(b, LOGITS) for b in self.batches(split))
            self._said[split] = [s.logits.float().cpu() for s in signals if s.logits is not None]
        return self._said[split]


def teacher_score(data: Data, evaluation: Any, teacher: Teacher, device: torch.device, ranks: Ranks) -> Mapping[str, float]:
    """The teacher's own metrics on the test split, in its own tokens, measured here."""
    data = data.translated or data
    device = getattr(teacher, "device", None) or device
    bare = Evaluator(data, evaluation, NoTeacher(), device, ranks)
    if isinstance(teacher, LiveTeacher):
        # A language model is asked in more ways than one, and its ids are not normalised.
        return bare.measure(teacher.network if reads_tokens(teacher.network) else _OwnInput(teacher), "test")
    meter = evaluation.meter(data.classes, device)
    for batch in bare.batches("test"):
        meter.update(teacher.signal(batch, LOGITS).logits.float(), batch.targets, None)  # type: ignore[union-attr]
    return dict(meter.compute())


class _OwnInput(nn.Module):
    """A live teacher as a plain network: inputs renormalised its way, logits only."""

    def __init__(self, teacher: LiveTeacher) -> None:
        super().__init__()
        self._teacher = [teacher]  # in a list: not a submodule, so train() and state_dict() do not reach it
        self.takes = teacher.takes
        for name in ("schedule", "scheduler"):  # of a noise predictor: what its samples are made by
            if hasattr(teacher.network, name):
                setattr(self, name, getattr(teacher.network, name))

    def forward(self, inputs: Tensor, **extra: Tensor) -> Tensor:
        return self._teacher[0].forward(self._teacher[0].renormalise(inputs), extra)[0]
