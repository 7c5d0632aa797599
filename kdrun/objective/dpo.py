"""DPO: direct preference optimisation (Rafailov et al., NeurIPS 2023, arXiv 2305.18290).

    L = -log sigmoid(beta ((l_w - r_w) - (l_l - r_l)))

of a pair of completions, w chosen and l rejected: l the summed log-probability of its tokens by the student, r that by the frozen
reference, which is the teacher (mostly what the student begins as: the same name, or plan.start_from=teacher). Unit: the pair; nats.
Constants: beta 0.1 is the usual one (the default of the public code TRL).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdrun.losses.policy import dpo
from kdrun.objective._checks import require_positive
from kdrun.objective._preference import Pair, PreferenceObjective
from kdrun.types import Needs


@dataclass(eq=False)
class DPO(PreferenceObjective):
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")

    def needs(self) -> Needs:
        return Needs(teacher_network=True)

    def margin(self, said: Pair, reference: Pair | None, lengths: Pair) -> Tensor:
        assert reference is not None
        return self.beta * ((said.chosen - reference.chosen) - (said.rejected - reference.rejected))

    def loss(self, said: Pair, reference: Pair | None, lengths: Pair) -> Tensor:
        assert reference is not None
        return dpo(*said, *reference, beta=self.beta)
