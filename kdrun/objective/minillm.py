"""MiniLLM: sequence-level reverse KL by policy gradient (Gu et al., ICLR 2024, arXiv 2306.08543; code microsoft/LMOps, minillm).

    grad KL(q || p) = E sum_t [grad KL(q_t || p_t) - R_{t+1} grad log q(y_t)],   R_t = sum_{t' >= t} log p(y_t') - log q(y_t')

of texts y ~ q: the term of step t exactly over the vocabulary (the single-step decomposition), the rest by the tokens that were
drawn. In the paper texts are drawn from a p + (1 - a) q (source.writer=mixture), each token weighs w_t = q(y_t) / (a p + (1 - a) q)(y_t),
the returns are divided by the number of tokens that they sum (length normalisation), and ratio times w is clipped as in PPO:

    L = single + policy,  policy = -min(rho A, clip(rho, 1 - clip, 1 + clip) A),  rho = q(y_t) / behaviour(y_t),  A = R_{t+1} / (T - t - 1)

Given texts (source.share below 1) give `lm_weight` times their cross-entropy: the paper has it from a pre-training text in every step, and
here a step is of one kind. `gamma`, `reward_scale`, `reward_bound` and `present` are what the public code does otherwise (0.95; 0.5; 100;
returns from the present step on, beside the exact term all the same); its whitening of returns over padded batches is not offered, since
that depends on how a batch is cut.

Unit: nats per token of single; policy has no meaning as a value. Constants: clip 0.2 is the public code's; gamma 1 and reward_scale 1 are
the equation's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Problem
from kdrun.losses.chunked import RowLoss
from kdrun.losses.divergence import cross_entropy
from kdrun.losses.policy import clipped_policy, log_ratio, minillm_rewards, returns
from kdrun.losses.precision import widen
from kdrun.losses.token import reverse_kl
from kdrun.objective._checks import require_nonnegative, require_positive, require_share
from kdrun.objective._language import TEACHER, TOKENS, LanguageObjective, Look
from kdrun.objective._rollouts import drawing_problems
from kdrun.source.rollout import BEHAVIOUR
from kdrun.types import Batch, Progress

RETURN = "return"  # rows of extra [B, T]: A of every drawn token


@dataclass(eq=False)
class MiniLLM(LanguageObjective):
    single_step: bool = True
    length_norm: bool = True
    clip: float | None = 0.2
    gamma: float = 1.0
    reward_scale: float = 1.0
    reward_bound: float | None = None
    present: bool = False
    lm_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "reward_scale", "temperature")
        require_share(self, "gamma")
        require_nonnegative(self, "lm_weight")
        for name in ("clip", "reward_bound"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if not self.single_step and not self.present:
            raise ValueError("single_step=False, present=False: one of them true, or no token hears of its own step")

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        found = super().problems(tree, student, teacher)
        return found + drawing_problems(tree, self.temperature, ("student", "mixture"), given=self.lm_weight > 0)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"policy": 1.0, "single": float(self.single_step), "lm": self.lm_weight}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        """Of written texts."""
        losses: dict[str, tuple[RowLoss, tuple[str, ...]]] = {"policy": (self._policy, (TOKENS, BEHAVIOUR, RETURN))}
        return losses | ({"single": (self._single, (TEACHER,))} if self.single_step else {})

    def losses_of(self, batch: Batch) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        return self.row_losses() if BEHAVIOUR in batch.extra else {"lm": (cross_entropy, (TOKENS,))}

    def beforehand(self, batch: Batch, look: Look) -> Batch:
        if BEHAVIOUR not in batch.extra:
            return batch
        scored = batch.targets >= 0
        found = returns(look(self._rewards, (TEACHER, TOKENS)), scored, self.gamma, self.length_norm)
        if not self.present:
            found = torch.where(scored, F.pad(found[:, 1:], (0, 1)), 0.0)
        return batch._replace(extra={**batch.extra, RETURN: found})

    # -- rows of logits [N, V] -> [N] ---------------------------------------------------------------------------------

    def _drawn(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return torch.log_softmax(widen(logits) / self.temperature, -1).gather(-1, tokens[:, None])[:, 0]

    def _rewards(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        bound = math.inf if self.reward_bound is None else self.reward_bound
        return minillm_rewards(self._drawn(student, tokens), self._drawn(teacher, tokens), self.reward_scale, bound)

    def _policy(self, student: Tensor, tokens: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
        low, high = (math.inf, math.inf) if self.clip is None else (self.clip, self.clip)
        return clipped_policy(log_ratio(self._drawn(student, tokens), behaviour), advantage, low, high)

    def _single(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student, teacher, temperature=self.temperature)
