"""SimPO: simple preference optimisation without a reference (Meng et al., NeurIPS 2024, arXiv 2405.14734).

    L = -log sigmoid(beta (l_w / |w| - l_l / |l|) - gamma)

of a pair of completions, w chosen and l rejected: l the summed log-probability of its tokens by the student, |.| their number. Unit: the
pair; nats. Constants: beta 2 and gamma 1 are those of the authors' README for Llama-3-Base (gamma / beta 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdrun.losses.policy import simpo
from kdrun.objective._checks import require_nonnegative, require_positive
from kdrun.objective._preference import Pair, PreferenceObjective


@dataclass(eq=False)
class SimPO(PreferenceObjective):
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        require_nonnegative(self, "gamma")

    def margin(self, said: Pair, reference: Pair | None, lengths: Pair) -> Tensor:
        return self.beta * (said.chosen / lengths.chosen.clamp(min=1) - said.rejected / lengths.rejected.clamp(min=1))

    def loss(self, said: Pair, reference: Pair | None, lengths: Pair) -> Tensor:
        return simpo(*said, lengths.chosen.clamp(min=1), lengths.rejected.clamp(min=1), self.beta, self.gamma)
