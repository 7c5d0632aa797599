"""GRPO: group relative policy optimisation (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300), the reinforcement learning that on-policy
distillation is held against.

    L = -mean min(rho A, clip(rho, 1 - low, 1 + high) A),   rho = q(y) / q_old(y),   A = (r - mean) / (sd + 1e-4) over its prompt's texts

of every token of a rollout (source=rollout with per_prompt above 1, a data set with a reward). No KL term. Unit: nothing; the value has
no meaning. Constants: low 0.2 and high 0.28 are DAPO's (arXiv 2503.14476), the spread is the unbiased one of TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.errors import Problem
from kdrun.losses.chunked import RowLoss
from kdrun.losses.policy import clipped_policy, log_ratio
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_positive
from kdrun.objective._language import TOKENS, LanguageObjective
from kdrun.objective._rollouts import drawing_problems
from kdrun.source.rollout import ADVANTAGE, BEHAVIOUR
from kdrun.types import Progress


@dataclass(eq=False)
class GRPO(LanguageObjective):
    rewarded = True

    clip_low: float = 0.2
    clip_high: float = 0.28
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "clip_low", "clip_high", "temperature")

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        found, source = super().problems(tree, student, teacher), tree["source"]
        if (source.get("per_prompt") or 1) < 2:
            remedy = "source=rollout source.per_prompt=8"
            return [*found, Problem("advantages are relative to the other completions of a prompt", "source.per_prompt", "", remedy)]
        return found + drawing_problems(tree, self.temperature)

    def listens(self) -> bool:
        return False

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"policy": 1.0}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        return {"policy": (self._rows_of, (TOKENS, BEHAVIOUR, ADVANTAGE))}

    def _rows_of(self, student: Tensor, tokens: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
        """Rows of logits [N, V] -> [N]."""
        said = torch.log_softmax(widen(student) / self.temperature, -1).gather(-1, tokens[:, None])[:, 0]
        return clipped_policy(log_ratio(said, behaviour), advantage, self.clip_low, self.clip_high)
