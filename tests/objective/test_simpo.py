"""SimPO: its numbers. What holds for every objective on pairs of completions is in test_dpo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.objective.test_dpo import Sure, pair_of, ready, spread, step
from tests.objective.toy import make


def test_simpo_of_the_example() -> None:
    """(-10 / 5, -12 / 8), beta 2, gamma 1: logit -2."""
    student = Sure(spread(-10, 5), spread(-12, 8))
    loss, _, kept = step(ready("simpo", student, student, 2), student, [pair_of(5, 8)])
    assert loss.item() == pytest.approx(2.126928, abs=5.1e-7)
    assert kept["margin"].item() == pytest.approx(-1, abs=1e-9)
    assert kept["correct"].item() == 0


def test_a_margin_that_is_met_is_a_coin() -> None:
    """-log sigmoid(0) where beta times the difference of the mean log-probabilities is gamma: (-8 / 8 + 12 / 8) * 2 = 1."""
    student = Sure(spread(-8, 8), spread(-12, 8))
    loss, _, _ = step(ready("simpo", student, student, 2), student, [pair_of(8, 8)])
    assert loss.item() == pytest.approx(0.693147, abs=5.1e-7)


def test_lengths_are_divided_out() -> None:
    """The same log-probability for each token of a completion twice as long is the same loss."""
    one, other = Sure(spread(-6, 4), spread(-9, 4)), Sure(spread(-12, 8), spread(-9, 4))
    losses = [step(ready("simpo", student, student, 2), student, [pair_of(count, 4)])[0] for student, count in ((one, 4), (other, 8))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("values", [{"beta": -1.0}, {"gamma": -1.0}])
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        make("simpo", **values)
