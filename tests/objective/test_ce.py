from __future__ import annotations

import pytest
import torch

from kdrun.types import Needs
from tests.objective.toy import PROGRESS, ZS, ZT, Y, logit_terms, make


def test_cross_entropy_of_the_example() -> None:
    assert logit_terms(make("ce"), ZS, ZT, Y)["ce"].sum.item() / 2 == pytest.approx(0.907606, abs=1e-6)


def test_needs_no_teacher() -> None:
    objective = make("ce")
    assert objective.needs() == Needs()
    assert objective.weights(PROGRESS) == {"ce": 1.0}
    ids = torch.arange(2)
    assert set(logit_terms(objective, ZS, ZT, ids)) == {"ce"}
