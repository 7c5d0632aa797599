from __future__ import annotations

import pytest
import torch

from kdrun.evaluation.breakdown import Breakdown, to_document
from kdrun.evaluation.classification import Classification
from tests.evaluation.test_classification import sample

NAMES = tuple("abcdefghij")


def broken_down(rows: int = 200, sizes: tuple[int, ...] = (200,), taught: bool = True) -> dict:  # type: ignore[type-arg]
    logits, targets, teacher = sample(rows)
    found = Breakdown(10, 15, torch.device("cpu"))
    for s, y, t in zip(logits.split(list(sizes)), targets.split(list(sizes)), teacher.split(list(sizes)), strict=True):
        found.update(s, y, t if taught else None)
    return to_document(found.sums(), NAMES)


def test_classes_add_up_to_the_mean_that_the_meter_measures() -> None:
    logits, targets, teacher = sample(200)
    meter = Classification().meter(10, "cpu")
    meter.update(logits, targets, teacher)
    whole, told = meter.compute(), broken_down()
    mean = lambda shares: sum(n * s for n, s in zip(told["count"], shares, strict=True) if n) / sum(told["count"])  # noqa: E731
    assert sum(told["count"]) == 200
    assert mean(told["top1"]) == pytest.approx(whole["top1"])
    assert mean(told["teacher"]["top1"]) == pytest.approx(whole["teacher_top1"])
    assert mean(told["teacher"]["agreement"]) == pytest.approx(whole["agreement"])
    ece = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in told["bins"] if row["count"]) / 200
    assert ece == pytest.approx(whole["ece"])


def test_it_does_not_depend_on_how_the_set_is_cut() -> None:
    whole, cut = broken_down(), broken_down(sizes=(7, 93, 100))
    assert cut["top1"] == whole["top1"]
    for mine, other in zip(cut["bins"], whole["bins"], strict=True):
        assert mine == pytest.approx(other)


def test_a_class_without_samples_has_no_share_and_an_unlabelled_row_counts_nowhere() -> None:
    found = Breakdown(3, 5, torch.device("cpu"))
    found.update(torch.eye(3), torch.tensor([0, -1, 0]))
    told = to_document(found.sums(), ("a", "b", "c"))
    assert told["count"] == [2, 0, 0]
    assert told["top1"] == [50.0, None, None]
    assert sum(row["count"] for row in told["bins"]) == 2
    assert "teacher" not in told
