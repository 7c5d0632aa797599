"""A critic's precision at a recall, and what a language model writes under an oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.digits import DigitsData
from kdrun.errors import Refused, RunFailed
from kdrun.evaluation.critic import Critic, CriticMeter, acceptance
from kdrun.evaluation.metrics import KINDS

LABELS = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0])
SCORES = torch.tensor([0.95, 0.9, 0.8, 0.7, 0.75, 0.4, 0.35, 0.2])


def logits_of(scores: Tensor) -> Tensor:
    z = scores.double().logit()
    return torch.stack([torch.zeros_like(z), z], 1)


def test_the_worked_example() -> None:
    meter = CriticMeter(0.8)
    for part in (slice(0, 3), slice(3, 8)):
        meter.update(logits_of(SCORES)[part], LABELS[part])
    found = meter.compute()
    assert found["precision_at_recall"] == pytest.approx(80)
    assert found["kept_share"] == pytest.approx(100 * 5 / 8)
    strict = CriticMeter(0.5)
    strict.update(logits_of(SCORES), LABELS)
    assert strict.compute()["precision_at_recall"] == pytest.approx(100)


def test_rows_that_nobody_judged_are_left_out() -> None:
    whole, some = CriticMeter(), CriticMeter()
    whole.update(logits_of(SCORES), LABELS)
    some.update(logits_of(torch.cat([SCORES, SCORES])), torch.cat([LABELS, torch.full_like(LABELS, -1)]))
    assert whole.compute() == some.compute()


def test_a_score_is_the_sigmoid_of_the_difference_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0], [3.0, 3.0]])
    torch.testing.assert_close(acceptance(logits), logits.double().softmax(1)[:, 1])
    assert acceptance(torch.tensor([[0.0, 100.0], [0.0, -700.0]])).tolist() == [1.0, pytest.approx(0, abs=1e-300)]
    assert acceptance(torch.tensor([[0.0, -700.0]])).item() > 0


def test_without_a_right_row_the_run_fails_in_words() -> None:
    meter = CriticMeter()
    meter.update(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RunFailed, match="none of 3 labels"):
        meter.compute()


def test_its_recall_and_its_data_are_checked() -> None:
    for recall in (0.0, 1.1):
        with pytest.raises(Refused) as refused:
            Critic(recall=recall)
        assert [p.key for p in refused.value.problems] == ["evaluation.recall"]
    (problem,) = Critic().problems(DigitsData().load())
    assert "10 classes" in problem.what
    assert set(Critic().names()) <= KINDS.keys()
    assert isinstance(Critic(recall=0.6).meter(2, "cpu"), nn.Module)
    assert Critic(recall=0.6).meter(2, "cpu").recall == 0.6
