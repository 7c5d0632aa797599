"""Thresholds by recall, with the numbers of a worked example, and what cutting does to a corpus."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdrun.evaluation.threshold import common_threshold, keeps, point, threshold

LABELS = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0])
SCORES = torch.tensor([0.95, 0.9, 0.8, 0.7, 0.75, 0.4, 0.35, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "recall", "tau", "kept_recall", "precision", "number"),
    [
        ("largest", 0.5, 0.8, 0.6, 1.0, 3),
        ("largest", 0.8, 0.7, 0.8, 0.8, 5),
        ("released", 0.5, 0.9, 0.2, 1.0, 1),
        ("released", 0.8, 0.4, 0.8, 0.8, 5),
    ],
)
def test_the_worked_example(rule: str, recall: float, tau: float, kept_recall: float, precision: float, number: int) -> None:
    found = threshold(rule, SCORES, LABELS, recall)  # type: ignore[arg-type]
    assert found == tau
    kept = point(keeps(rule, SCORES, found), LABELS)  # type: ignore[arg-type]
    assert kept.recall == pytest.approx(kept_recall, abs=1e-12)
    assert kept.precision == pytest.approx(precision, abs=1e-12)
    assert kept.kept == number


def test_the_released_rule_counts_recall_with_equality_and_keeps_without() -> None:
    tau = threshold("released", SCORES, LABELS, 0.5)
    assert point(SCORES.ge(tau), LABELS).recall == pytest.approx(0.4)
    assert point(keeps("released", SCORES, tau), LABELS).recall == pytest.approx(0.2)


def test_the_order_of_rows_changes_nothing() -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    for rule in ("largest", "released"):
        for recall in (0.1, 0.5, 0.6, 0.8, 1.0):
            assert threshold(rule, SCORES[order], LABELS[order], recall) == threshold(rule, SCORES, LABELS, recall)  # type: ignore[arg-type]


def test_full_recall_keeps_every_right_row_and_ties_stand_together() -> None:
    assert threshold("largest", SCORES, LABELS, 1.0) == 0.35
    scores = torch.tensor([0.9, 0.5, 0.5, 0.1])
    assert threshold("largest", scores, torch.tensor([1, 1, 0, 0]), 0.9) == 0.5
    assert point(keeps("largest", scores, 0.5), torch.tensor([1, 1, 0, 0])).kept == 3


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    labels = (torch.rand(300, generator=source) < 0.6).long()
    return torch.rand(300, generator=source, dtype=torch.float64) * 0.7 + labels * 0.3, labels


@pytest.mark.parametrize("seed", range(4))
def test_largest_is_the_largest_with_that_recall(seed: int) -> None:
    scores, labels = drawn(seed)
    for recall in (0.5, 0.6, 0.7, 0.8, 0.9):
        tau = threshold("largest", scores, labels, recall)
        assert point(scores >= tau, labels).recall >= recall
        assert all(point(scores >= higher, labels).recall < recall for higher in scores[scores > tau].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_as_the_threshold_rises_nothing_comes_back_and_recall_never_rises(seed: int) -> None:
    scores, labels = drawn(seed)
    for rule in ("largest", "released"):
        before, recall = keeps(rule, scores, None), 1.0  # type: ignore[arg-type]
        assert bool(before.all())
        for tau in torch.linspace(0, 1, 41).tolist():
            kept = keeps(rule, scores, tau)  # type: ignore[arg-type]
            assert not bool((kept & ~before).any())
            assert point(kept, labels).recall <= recall
            before, recall = kept, point(kept, labels).recall


def test_zero_keeps_all_that_did_not_underflow_and_none_keeps_all() -> None:
    scores = torch.tensor([-2000.0, -700.0, 0.0]).double().sigmoid()
    assert keeps("released", scores, 0.0).tolist() == [False, True, True]
    assert keeps("released", scores, None).tolist() == [True, True, True]


def test_several_sets_have_the_mean_of_their_thresholds() -> None:
    (a, la), (b, lb) = drawn(1), drawn(2)
    each = [threshold("released", a, la, 0.7), threshold("released", b, lb, 0.7)]
    assert common_threshold("released", [(a, la), (b, lb)], 0.7) == pytest.approx(sum(each) / 2, abs=1e-15)
    assert each[0] != each[1]


@pytest.mark.parametrize("recall", [0.0, -0.1, 1.1])
def test_a_recall_outside_its_range_is_refused(recall: float) -> None:
    with pytest.raises(ValueError, match="legal range"):
        threshold("largest", SCORES, LABELS, recall)


def test_without_a_right_row_there_is_no_recall() -> None:
    with pytest.raises(ValueError, match="none of 8 labels"):
        threshold("largest", SCORES, torch.zeros(8), 0.5)
    assert math.isnan(point(SCORES > 2, LABELS).precision)
    assert math.isnan(point(SCORES > 0, torch.zeros(8)).recall)
