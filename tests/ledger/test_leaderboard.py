"""Ranked arms, and which of them cannot be told apart."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kdrun.ledger.leaderboard import Row, leaderboard
from kdrun.ledger.statistics import adjusted


def arms(**values: list[float]) -> dict[str, dict[Any, float]]:
    return {arm: dict(enumerate(runs, 1)) for arm, runs in values.items()}


def by_arm(rows: list[Row]) -> dict[str, Row]:
    return {row.arm: row for row in rows}


THREE = arms(low=[60.0, 61.2, 62.1, 63.0], best=[70.0, 71.0, 72.0, 73.1], near=[69.9, 71.1, 71.8, 73.2])


def test_the_best_comes_first_whichever_direction_is_better() -> None:
    assert [(r.rank, r.arm) for r in leaderboard(THREE, True)] == [(1, "best"), (2, "near"), (3, "low")]
    assert [(r.rank, r.arm) for r in leaderboard(THREE, False)] == [(1, "low"), (2, "near"), (3, "best")]


def test_a_row_holds_the_mean_and_the_difference_to_the_first_paired_by_seed() -> None:
    first, _, low = leaderboard(THREE, True)
    assert (first.n, first.mean, first.gap, first.gap_low, first.p, first.paired) == (4, pytest.approx(71.525), None, None, None, None)
    gaps = np.array([-10.0, -9.8, -9.9, -10.1])
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / 2
    assert (low.gap, low.gap_low, low.gap_high) == pytest.approx((-9.95, -9.95 - half, -9.95 + half))
    assert low.paired is True


def test_p_values_are_corrected_for_all_pairs_by_holm() -> None:
    columns = {arm: list(by_seed.values()) for arm, by_seed in THREE.items()}
    pairs = list(itertools.combinations(["best", "near", "low"], 2))
    raw = [stats.ttest_rel(columns[a], columns[b]).pvalue for a, b in pairs]
    expected = dict(zip(pairs, adjusted(raw), strict=True))
    rows = by_arm(leaderboard(THREE, True))
    assert rows["near"].p == pytest.approx(expected["best", "near"])
    assert rows["low"].p == pytest.approx(expected["best", "low"])
    assert rows["low"].p > raw[pairs.index(("best", "low"))]  # the correction costs something


def test_rows_share_a_letter_exactly_if_they_cannot_be_told_apart() -> None:
    rows = by_arm(leaderboard(THREE, True))
    assert {arm: row.mark for arm, row in rows.items()} == {"best": "a", "near": "a", "low": "b"}
    assert rows["best"].tied_with(rows["near"])
    assert not rows["low"].tied_with(rows["near"])


def test_letters_may_overlap_where_being_tied_is_not_transitive() -> None:
    """The middle can be told from neither end, the ends from each other."""
    chain = arms(top=[3.0, 3.1, 2.9, 3.0], middle=[2.6, 1.4, 2.8, 1.2], bottom=[1.0, 1.1, 0.9, 1.0])
    assert {r.arm: r.mark for r in leaderboard(chain, True)} == {"top": "a", "middle": "ab", "bottom": "b"}


def test_letters_agree_with_the_corrected_p_values_of_every_pair() -> None:
    generator = np.random.default_rng(3)
    for _ in range(20):
        values = arms(**{f"arm{i}": (generator.normal(i // 2, 0.3, 6)).tolist() for i in range(7)})
        rows = by_arm(leaderboard(values, True))
        pairs = list(itertools.combinations(values, 2))
        raw = [stats.ttest_rel(list(values[a].values()), list(values[b].values())).pvalue for a, b in pairs]
        for (a, b), p in zip(pairs, adjusted(raw), strict=True):
            assert rows[a].tied_with(rows[b]) == (p >= 0.05)


def test_equal_arms_are_told_apart_in_one_board_of_twenty_at_most() -> None:
    """Five arms of one and the same experiment: the best is chosen by the runs, and must still not be called better than another."""
    draws = np.random.default_rng(0).normal(70.0, 0.4, size=(400, 5, 5))
    boards = [leaderboard({f"arm{i}": dict(enumerate(runs)) for i, runs in enumerate(one.tolist())}, True) for one in draws]
    wrong = np.mean([len({letter for row in rows for letter in row.ties}) > 1 for rows in boards])
    assert wrong <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)
    assert wrong > 0  # it does find something now and then: the test is not empty


def test_arms_of_other_seeds_are_compared_by_welch() -> None:
    a, b = [70.0, 70.4, 70.2], [68.0, 68.9, 68.1]
    first, second = leaderboard({"a": dict(enumerate(a)), "b": dict(enumerate(b, 10))}, True)
    assert second.paired is False
    assert second.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert second.gap == pytest.approx(np.mean(b) - np.mean(a))
    assert not first.tied_with(second)


def test_one_common_seed_is_not_enough_to_pair_by() -> None:
    rows = leaderboard({"a": {1: 70.0, 2: 70.4, 3: 70.2}, "b": {3: 68.0, 4: 68.9, 5: 68.1}}, True)
    assert rows[1].paired is False
    assert rows[1].p is not None


def test_single_runs_are_told_apart_from_nobody() -> None:
    first, second = leaderboard(arms(a=[80.0], b=[20.0]), True)
    assert (second.gap, second.gap_low, second.p) == (-60.0, None, None)
    assert first.tied_with(second)


def test_a_run_that_diverged_comes_last_with_no_letter_and_weakens_no_other() -> None:
    values = {**THREE, "lost": {1: math.nan, 2: 99.0, 3: 99.0, 4: 99.0}}
    for higher in (True, False):
        rows = leaderboard(values, higher)
        assert (rows[-1].arm, rows[-1].mark, rows[-1].p, rows[-1].low) == ("lost", "", None, None)
        assert math.isnan(rows[-1].mean)
        assert not rows[-1].tied_with(rows[0])
        assert rows[:-1] == leaderboard(THREE, higher)


def test_equal_means_share_a_rank() -> None:
    rows = leaderboard(arms(a=[1.0, 2.0], b=[2.0, 1.0], c=[0.5, 0.0]), True)
    assert [r.rank for r in rows] == [1, 1, 3]


def test_one_arm_is_a_board_and_none_is_an_empty_one() -> None:
    assert [(r.rank, r.mark) for r in leaderboard(arms(a=[1.0, 2.0]), True)] == [(1, "a")]
    assert leaderboard({}, True) == []
    with pytest.raises(ValueError, match="no values"):
        leaderboard({"a": {}}, True)


def test_more_groups_than_letters_stay_readable() -> None:
    many = {f"arm{i:02}": {1: float(i), 2: float(i) + 1e-9, 3: float(i)} for i in range(28)}
    marks = [row.mark for row in leaderboard(many, False)]
    assert marks[0] == "a"
    assert marks[25:] == ["z", "ba", "bb"]
