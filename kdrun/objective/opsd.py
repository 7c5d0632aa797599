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
from typing import Literal

import torch
from torch import Tensor

from kdrun.losses import token
from kdrun.losses.chunked import RowLoss
from kdrun.losses.policy import sampled_token
from kdrun.losses.precision import widen
from kdrun.losses.token import keep_top
from kdrun.objective._checks import require_legal, require_positive, require_share
from kdrun.objective._language import TEACHER, TOKENS, LanguageObjective
from kdrun.types import Progress

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

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"kd": 1.0}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        if self.divergence == "sampled_token":
            return {"kd": (self._sampled, (TEACHER, TOKENS))}
        return {"kd": (self._capped, (TEACHER,))}

    def _capped(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Rows of logits [N, V] -> [N]."""
        if self.top_k is not None and self.top_k < student.shape[-1]:
            student, teacher = keep_top(student, teacher, self.top_k)
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.beta)
        cap = torch.inf if self.cap is None else self.cap
        return token.entry_clipped(student, teacher, cap, beta=beta, temperature=self.temperature)

    def _sampled(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        take = lambda logits: torch.log_softmax(widen(logits) / self.temperature, -1).gather(-1, tokens[:, None])[:, 0]  # noqa: E731
        return sampled_token(take(student), take(teacher))
