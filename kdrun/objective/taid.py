"""TAID: Temporally Adaptive Interpolated Distillation (Shing et al., ICLR 2025, arXiv 2501.16937; code SakanaAI/TAID).

    p_t = softmax((1 - t) stopgrad(zs) + t zt),   L = J = KL(p_t || q) of every scored token,   gradient q - p_t

and t moves once per step, after the loss was taken with the present one (n steps done before this batch, N in all):

    delta = (J_prev - J) / (J_prev + 1e-15),   m <- beta m + (1 - beta) delta,   dt = alpha sigmoid(m) (1 - t)
    t <- min(t_end, max(t_start + (t_end - t_start) n / N, t + dt))

`value` ce gives -sum p_t log q, as the authors' code: the same gradient, another J for the controller. Unit: nats per token, J over all
ranks and micro-batches (in the authors' code each process has a controller of its own). Constants: alpha 5e-4, beta 0.99, t_end 1 and,
for a Phi-3 teacher, t_start 0.4 are the paper's; alpha belongs to about 16,000 steps: keep alpha N near 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdrun.losses import token
from kdrun.losses.chunked import RowLoss
from kdrun.losses.divergence import cross_entropy
from kdrun.objective._checks import require_nonnegative, require_share
from kdrun.objective._language import COUNT, SUM, TEACHER, TOKENS, LanguageObjective
from kdrun.types import Connectors, Context, Progress

EPS = 1e-15  # authors' code
Value = Literal["ce", "kl"]


@dataclass(eq=False)
class TAID(LanguageObjective):
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True
    value: Value = "ce"
    ce_weight: float = 0.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "t_start", "t_end", "beta")
        require_nonnegative(self, "ce_weight", "kd_weight")
        require_nonnegative(self, "alpha")
        if not self.ce_weight and not self.kd_weight:
            raise ValueError("ce_weight=0 and kd_weight=0: one of them above 0, or nothing is learned")
        if self.t_start > self.t_end:
            raise ValueError(f"t_start={self.t_start}: legal range [0, t_end={self.t_end}]")
        if self.value not in get_args(Value):
            raise ValueError(f"value={self.value!r}: legal values {', '.join(get_args(Value))}")
        if self.value == "kl" and self.adaptive and self.t_start == 0:
            raise ValueError("t_start=0 with value=kl: the first J is 0 and the controller never recovers; t_start above 0, or value=ce")

    def setup(self, context: Context) -> Connectors:
        as_scalar = partial(torch.tensor, dtype=torch.float64)
        # J before the first step is infinite: the first call only stores.
        self.state = {"t": as_scalar(self.t_start), "momentum": as_scalar(0.0), "previous": as_scalar(math.inf)}
        self._total = context.total_steps
        return super().setup(context)

    def listens(self) -> bool:
        return self.kd_weight > 0

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "kd": self.kd_weight}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        losses: dict[str, tuple[RowLoss, tuple[str, ...]]] = {"ce": (cross_entropy, (TOKENS,))} if self.ce_weight else {}
        return losses | ({"kd": (partial(token.taid, t=self.state["t"], value=self.value), (TEACHER,))} if self.kd_weight else {})

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        scored = kept[COUNT].sum()
        loss = kept[SUM].double().sum() / scored.clamp(min=1)
        # A step in which nothing was scored has no loss; as a loss of 0 it would stop the controller for thousands of steps.
        self.move(torch.where(scored > 0, loss, self.state["previous"]), progress.step)

    def move(self, loss: Tensor, done: int) -> None:
        """One call of the controller: the loss J of the batch before which `done` steps were finished."""
        t, momentum, previous = self.state["t"], self.state["momentum"], self.state["previous"]
        floor = self.t_start + (self.t_end - self.t_start) * done / self._total
        first = previous.isinf()
        if self.adaptive:
            delta = (previous - loss) / (previous + EPS)
            moved = self.beta * momentum + (1 - self.beta) * delta
            ahead = t + self.alpha * torch.sigmoid(moved) * (1 - t)
            momentum.copy_(torch.where(first, momentum, moved))
            t.copy_(torch.where(first, t, ahead.clamp(min=floor).clamp(max=self.t_end)))
        else:
            t.copy_(torch.where(first, t, torch.full_like(t, min(floor, self.t_end))))
        previous.copy_(loss)

    def report(self) -> dict[str, float]:
        return {"taid_t": float(self.state["t"])}

    def to(self, device: Any) -> None:
        self.state = {name: value.to(device) for name, value in self.state.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.state.items():
            value.copy_(state[name])
