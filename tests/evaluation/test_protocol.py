from __future__ import annotations

import math
from typing import Any

import pytest

from kdrun.errors import Refused
from kdrun.evaluation.protocol import reported

VALIDATION = [60.0, 72.0, 72.0, 70.0]
TEST = [61.0, 71.0, 73.0, 70.5]


def history(validation: list[float] | None = VALIDATION, test: list[float] = TEST, metric: str = "top1") -> list[dict[str, Any]]:
    return [
        {"epoch": i + 1, "validation": None if validation is None else {metric: validation[i]}, "test": {metric: value}}
        for i, value in enumerate(test)
    ]


def test_last_is_the_test_metric_of_the_last_epoch() -> None:
    value, description = reported(history(), "last")
    assert value == 70.5
    assert description == "test top1 at the last epoch (4)"


def test_last_is_never_an_earlier_epoch() -> None:
    entries = history()
    entries[-1]["test"] = None
    with pytest.raises(Refused, match="epoch 4 has no test metrics"):
        reported(entries, "last")


def test_best_val_never_looks_at_the_test_metric() -> None:
    value, description = reported(history(), "best_val")
    assert value == 71.0  # epochs 2 and 3 are equal on validation: the earlier, though the later is better on test
    assert "epoch 2, chosen by validation" in description


def test_best_val_without_a_validation_split_says_how_to_get_one() -> None:
    with pytest.raises(Refused, match=r"dataset\.validation=0\.1"):
        reported(history(validation=None), "best_val")


def test_best_is_lowest_where_lower_is_better() -> None:
    assert reported(history([0.5, 0.3, 0.4, 0.6], [0.55, 0.35, 0.33, 0.7], "nll"), "best_val", "nll").value == 0.35


def test_best_of_a_metric_of_unknown_direction_is_refused() -> None:
    with pytest.raises(Refused, match="higher or a lower 'gain' is better"):
        reported(history(metric="gain"), "best_val", "gain")


def test_an_epoch_that_is_not_a_number_is_never_best() -> None:
    assert reported(history([math.nan, 1.0, 2.0, math.nan]), "best_val").value == 73.0
    with pytest.raises(Refused, match="diverged"):
        reported(history([math.nan] * 4), "best_val")


def test_best_test_says_that_it_cannot_be_compared() -> None:
    value, description = reported(history(), "best_test")
    assert value == 73.0
    assert "selected on test: as published, not comparable" in description


def test_median_of_the_last_k() -> None:
    assert reported(history(), "median_last_k", last_k=3) == (71.0, "median of the last 3 test evaluations")
    assert reported(history(), "median_last_k", last_k=2).value == pytest.approx(71.75)


def test_median_says_when_there_were_fewer_evaluations() -> None:
    assert reported(history(), "median_last_k", last_k=9) == (70.75, "median of the last 4 test evaluations (of 9 asked for)")


def test_median_counts_only_epochs_that_were_tested() -> None:
    entries = history()
    entries[2]["test"] = None
    assert reported(entries, "median_last_k", last_k=2).value == pytest.approx(70.75)


def test_median_with_a_diverged_epoch_is_not_a_number() -> None:
    for place in range(3):
        values = [70.0, 71.0, 72.0]
        values[place] = math.nan
        assert math.isnan(reported(history(None, values), "median_last_k", last_k=3).value)


def test_unknown_names_come_with_the_nearest_legal_one() -> None:
    with pytest.raises(Refused, match="did you mean best_val"):
        reported(history(), "best_vla")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="did you mean top1"):
        reported(history(), "last", "top")
    with pytest.raises(Refused, match="nothing was evaluated"):
        reported([], "last")
