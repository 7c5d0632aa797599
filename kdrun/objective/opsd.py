"""OPSD: on-policy self-distillation with a privileged teacher (Zhao et al., ICML 2026, arXiv 2601.18734; code siyan-zhao/OPSD).

    L = mean over a rollout's tokens of  sum_v min(l_v, cap),   l_v = p_v (log p_v - log q_v)

q the student after its prompt, p the teacher after a prompt that also holds the reference solution, both at the rollout's temperature and
both on the student's own tokens (source=rollout, teacher.prompt=privileged). The cap acts on every entry of the vocabulary before the
sum; a capped entry's logit is pushed down by the others. `divergence` jsd, reverse_kl: the capped entry is theirs. sampled_token:

    L = -mean (log p[y] - log q[y]) log q[y],  the bracket without gradient

Unit: nats per token, over all ranks and micro-batches. Constants: cap 0.05 is the authors' scripts' since March 2026 and not tuned; it
scales with the problem. beta 0.5 is their first release's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.errors import Problem
from kdrun.losses import token
from kdrun.losses.chunked import RowLoss
from kdrun.losses.policy import sampled_token
from kdrun.losses.precision import widen
from kdrun.losses.token import keep_top
from kdrun.objective._checks import require_legal, require_positive, require_share
from kdrun.objective._language import COUNT, TEACHER, TOKENS, WATCHED, LanguageObjective
from kdrun.objective._rollouts import drawing_problems
from kdrun.types import Connectors, Context, Progress

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"]


@dataclass(eq=False)
class OPSD(LanguageObjective):
    divergence: Divergence = "forward_kl"
    cap: float | None = 0.05
    beta: float = 0.5
    top_k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_legal(self, "divergence")
        require_share(self, "beta")
        require_positive(self, "temperature")
        if self.cap is not None:
            require_positive(self, "cap")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: legal range [1, inf)")

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        found = super().problems(tree, student, teacher)
        return found + (drawing_problems(tree, self.temperature) if self.divergence == "sampled_token" else [])

    def setup(self, context: Context) -> Connectors:
        self._clipped: Tensor | None = None  # the share of entries that the cap cut in the last step
        return super().setup(context)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"kd": 1.0}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        if self.divergence == "sampled_token":
            return {"kd": (self._sampled, (TEACHER, TOKENS))}
        return {"kd": (self._capped, (TEACHER,))}

    def _capped(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of logits [N, V] -> [N], and the share of entries that the cap cuts [N]."""
        if self.top_k is not None and self.top_k < student.shape[-1]:
            student, teacher = keep_top(student, teacher, self.top_k)
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.beta)
        if self.cap is None:
            return token.entry_clipped(student, teacher, torch.inf, beta, self.temperature), None
        return token.clipped_entries(student, teacher, self.cap, beta, self.temperature)

    def report(self) -> dict[str, float]:
        """The share of entries that the cap cut in the last step."""
        return {} if self._clipped is None else {"clipped_share": float(self._clipped)}

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        if WATCHED in kept:
            self._clipped = kept[WATCHED].sum() / kept[COUNT].sum().clamp(min=1)  # stays on the device

    def state_dict(self) -> dict[str, Any]:
        return {"clipped": self._clipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._clipped = state["clipped"]

    def _sampled(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        take = lambda logits: torch.log_softmax(widen(logits) / self.temperature, -1).gather(-1, tokens[:, None])[:, 0]  # noqa: E731
        return sampled_token(take(student), take(teacher))
