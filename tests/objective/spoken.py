"""One optimiser step of an objective on texts, as the loop takes it; language models that are asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.objective._language import LanguageObjective
from kdrun.student.taps import Tapped, ask
from kdrun.types import Batch, Context, ModelSpec, Progress, Signal, Start
from tests.dataset.texts import V
from tests.objective.toy import make

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "skew_forward", "skew_reverse", "adaptive")
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    **{name: ("lm_kd", {"divergence": name}) for name in DIVERGENCES},
    "forward_kl+ce": ("lm_kd", {"ce_weight": 0.3, "kd_weight": 0.7, "temperature": 2.0}),
    "taid-ce": ("taid", {"value": "ce"}),
    "taid-kl": ("taid", {"value": "kl"}),
    "taid+ce": ("taid", {"ce_weight": 0.5}),
}


def ready(name: str, student: nn.Module, teacher: nn.Module | None, steps: int = 30, classes: int = V, **values: Any) -> Any:
    """An objective set up and started beside these networks."""
    kind, settings = SETTINGS.get(name, (name, {}))
    objective = make(kind, **settings | values)
    spec = ModelSpec(classes, (8,), {}, (8, classes))
    none = torch.zeros(4, dtype=torch.int64)
    objective.setup(Context(spec, None if teacher is None else spec, classes, none, 0, steps_per_epoch=3, total_steps=steps))
    objective.start(Start(student, teacher, lambda: iter(())), nn.ModuleDict())
    return objective


class Step:
    """The loss of one step over its micro-batches, the gradient of the student and what after_step is given."""

    def __init__(self, objective: LanguageObjective, student: nn.Module, teacher: nn.Module | None, batches: Sequence[Batch]) -> None:
        counted = [objective.count(batch) for batch in batches]
        counts = {unit: max(1, sum(int(c[unit]) for c in counted)) for unit in objective.units()}
        weights = objective.weights(Progress(0, 30, 3))
        self.values: dict[str, float] = {}
        self.loss, kept = torch.zeros((), dtype=torch.float64), []
        for batch in batches:
            wanted = objective.needs().teacher_logits and teacher is not None
            with torch.no_grad():
                signal = Signal(ask(teacher, batch) if wanted and teacher is not None else None, {})
            terms, keep = objective.compute(Tapped(student, {}), batch, signal, "student", nn.ModuleDict(), None)
            kept.append(keep)
            for key, term in terms.items():
                self.values[key] = self.values.get(key, 0.0) + term.sum.item() / counts[term.unit]
                self.loss = self.loss + weights[key] * term.sum / counts[term.unit]
        self.kept: Mapping[str, Tensor] = {key: torch.cat([k[key] for k in kept]) for key in kept[0]}
        found = torch.autograd.grad(self.loss, list(student.parameters()), allow_unused=True)
        self.gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(student.parameters(), found, strict=True)]
        self.ids = torch.cat([batch.ids for batch in batches])


class Said(nn.Module):
    """A language model that says given logits [B, T, V], whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.vocabulary = logits.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def scored(shape: tuple[int, int], targets: Tensor | None = None) -> Batch:
    """A batch [B, T] of which every token is scored."""
    ids = torch.arange(shape[0])
    return Batch(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64) if targets is None else targets, ids, ids, {})
