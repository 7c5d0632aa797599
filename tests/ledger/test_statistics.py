from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy import stats

from kdrun.ledger.statistics import Summary, adjusted, paired, power_pairs, power_seeds, prediction_interval, summary, welch

# Top-1 of five runs of one recipe, reported by users of a public code base (mdistiller, issue 7).
RUNS = [76.20, 75.80, 75.89, 75.85, 76.15]


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_mean_and_interval_of_five_public_runs() -> None:
    s = summary(RUNS)
    assert s.n == 5
    assert s.mean == pytest.approx(75.978)
    assert s.sd == pytest.approx(0.18349, abs=1e-5)
    assert (round(s.low or 0, 2), round(s.high or 0, 2)) == (75.75, 76.21)


def test_prediction_interval_of_five_public_runs() -> None:
    low, high = prediction_interval(RUNS) or (0, 0)
    assert (round(low, 2), round(high, 2)) == (75.42, 76.54)


def test_hand_computed_interval_of_three_values() -> None:
    s = summary([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653 in every table; sd 1, standard error 1 / sqrt(3).
    assert s.sd == 1.0
    assert s.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert s.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert prediction_interval(s) == pytest.approx((2 - 4.302653 * math.sqrt(4 / 3), 2 + 4.302653 * math.sqrt(4 / 3)), abs=1e-6)


def test_the_prediction_for_very_many_runs_is_the_interval_of_the_mean() -> None:
    s = summary(RUNS)
    assert prediction_interval(RUNS, further=10**12) == pytest.approx((s.low, s.high), abs=1e-6)


def test_intervals_cover_what_they_promise() -> None:
    draws = np.random.default_rng(0).normal(70.0, 0.4, size=(3000, 5))
    means = [summary(row[:4].tolist()) for row in draws]
    assert np.mean([(s.low or 0) <= 70.0 <= (s.high or 0) for s in means]) == pytest.approx(0.95, abs=0.012)
    predictions = [prediction_interval(s) or (0, 0) for s in means]
    assert np.mean([low <= row[4] <= high for (low, high), row in zip(predictions, draws, strict=True)]) == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval() -> None:
    assert summary([76.2]) == Summary(1, 76.2, None, None, None)
    assert prediction_interval([76.2]) is None
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_equal_values_have_an_interval_without_width() -> None:
    # The plain formula gives 76.2 three times over a spread of 1e-14.
    s = summary([76.2] * 3)
    assert (s.n, s.sd) == (3, 0.0)
    assert s.low == s.high == s.mean == pytest.approx(76.2)
    assert prediction_interval([76.2] * 3) == pytest.approx((76.2, 76.2))
    assert summary([0.0, 0.0]) == Summary(2, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_is_not_dropped_and_leaves_no_interval(bad: float) -> None:
    s = summary([1.0, bad, 2.0])
    assert s.n == 3
    assert not math.isfinite(s.mean)
    assert (s.sd, s.low, s.high) == (None, None, None)
    assert prediction_interval([1.0, bad, 2.0]) is None
    for gap in (paired(by_seed([1.0, bad, 2.0]), by_seed([0.0, 1.0, 0.5])), welch([1.0, bad, 2.0], [0.0, 1.0, 0.5])):
        assert not math.isfinite(gap.mean)
        assert (gap.low, gap.high, gap.p) == (None, None, None)


def test_infinities_of_both_signs_have_no_mean() -> None:
    assert math.isnan(summary([math.inf, -math.inf]).mean)


def test_paired_is_the_paired_t_test() -> None:
    a, b = [75.0, 75.6, 74.9, 75.2], [73.1, 73.9, 73.0, 73.9]
    expected = stats.ttest_rel(a, b)
    gap = paired(by_seed(a), by_seed(b))
    interval = expected.confidence_interval(0.95)
    assert gap.mean == pytest.approx(1.7)
    assert (gap.low, gap.high) == pytest.approx((interval.low, interval.high))
    assert gap.p == pytest.approx(expected.pvalue)
    assert gap.n == 4


def test_paired_uses_the_common_seeds_whatever_their_order() -> None:
    a, b = {1: 5.0, 2: 6.5, 3: 7.0, 9: 100.0}, {3: 6.0, 8: -100.0, 1: 4.5, 2: 5.0}
    assert paired(a, b) == paired({1: 5.0, 2: 6.5, 3: 7.0}, {1: 4.5, 2: 5.0, 3: 6.0})
    assert paired(a, b).n == 3


def test_paired_does_not_see_what_moves_both_arms() -> None:
    a, b, luck = [3.0, 5.0, 4.0], [2.0, 3.5, 3.0], [100.0, -50.0, 7.0]
    moved = paired(by_seed([x + m for x, m in zip(a, luck, strict=True)]), by_seed([x + m for x, m in zip(b, luck, strict=True)]))
    still = paired(by_seed(a), by_seed(b))
    assert (moved.mean, moved.low, moved.high) == pytest.approx((still.mean, still.low, still.high))


def test_differences_change_sign_with_their_arms() -> None:
    a, b = [75.0, 75.6, 74.9], [73.1, 74.4, 73.0]
    for gap, back in ((paired(by_seed(a), by_seed(b)), paired(by_seed(b), by_seed(a))), (welch(a, b), welch(b, a))):
        assert (-back.mean, -(back.high or 0), -(back.low or 0)) == pytest.approx((gap.mean, gap.low, gap.high))
        assert back.p == pytest.approx(gap.p)


def test_arms_without_enough_common_seeds_have_no_interval() -> None:
    none, one = paired({1: 2.0}, {2: 1.0}), paired({1: 2.0, 2: 3.0}, {2: 1.0})
    assert math.isnan(none.mean)
    assert (none.low, none.p, none.n) == (None, None, 0)
    assert (one.mean, one.low, one.high, one.p, one.n) == (2.0, None, None, None, 1)


def test_identical_arms_differ_by_nothing_for_certain() -> None:
    for gap in (paired(by_seed(RUNS), by_seed(RUNS)), welch([2.0, 2.0], [2.0, 2.0])):
        assert (gap.mean, gap.low, gap.high, gap.p) == (0.0, 0.0, 0.0, 1.0)


def test_equal_differences_leave_no_doubt_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 75.1 - 74.0, 76.3 - 75.2 and 77.7 - 76.6 differ by rounding alone.
        gap = paired(by_seed([75.1, 76.3, 77.7]), by_seed([74.0, 75.2, 76.6]))
        assert gap.mean == gap.low == gap.high == pytest.approx(1.1)
        assert gap.p == 0.0
        assert welch([3.0, 3.0], [2.0, 2.0]).p == 0.0


def test_welch_is_scipys_from_samples_and_from_summaries() -> None:
    a, b = RUNS, [76.5, 76.1, 76.9]
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    for gap in (welch(a, b), welch(summary(a), summary(b)), welch(a, Summary(3, summary(b).mean, summary(b).sd, None, None))):
        assert (gap.low, gap.high, gap.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
        assert gap.n == 8


def test_welch_with_an_arm_of_one_run_has_no_interval() -> None:
    gap = welch(RUNS, [76.32])
    assert gap.mean == pytest.approx(-0.342)
    assert (gap.low, gap.high, gap.p) == (None, None, None)


@pytest.mark.parametrize(("detect", "seeds"), [(0.3, 7), (0.5, 4), (0.2, 14)])
def test_seeds_for_a_gap_at_a_spread_of_018(detect: float, seeds: int) -> None:
    assert power_seeds(detect, 0.18) == seeds


def test_seeds_of_the_textbook_effects() -> None:
    # Cohen, Statistical Power Analysis (1988), table 2.4.1: large, medium and small effect at 80 % power, 5 % level.
    assert [power_seeds(effect, 1.0) for effect in (0.8, 0.5, 0.2)] == [26, 64, 394]


def test_pairs_of_the_textbook_effects() -> None:
    """A paired t-test at 80 % power and the 5 % level: 199, 34 and 15 pairs (G*Power 3.1; R's pwr.t.test gives 198.15, 33.37, 14.30)."""
    assert [power_pairs(effect, 1.0) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]


def test_the_pairs_reach_the_power_and_one_less_does_not() -> None:
    detect, sd, n = 0.3, 0.18, power_pairs(0.3, 0.18)
    rng = np.random.default_rng(0)
    for pairs, enough in ((n, True), (n - 1, False)):
        found = stats.ttest_1samp(rng.normal(detect, sd, (pairs, 40_000)), 0.0).pvalue < 0.05
        assert (np.mean(found) >= 0.8) is np.bool_(enough)


def test_the_seeds_reach_the_power_and_one_less_does_not() -> None:
    detect, sd, n = 0.3, 0.18, power_seeds(0.3, 0.18)
    rng = np.random.default_rng(0)
    for seeds, enough in ((n, True), (n - 1, False)):
        a, b = rng.normal(detect, sd, (seeds, 40_000)), rng.normal(0.0, sd, (seeds, 40_000))
        assert (np.mean(stats.ttest_ind(a, b).pvalue < 0.05) >= 0.8) is np.bool_(enough)


def test_fewer_seeds_for_larger_gaps_and_never_below_two() -> None:
    needed = [power_seeds(gap, 0.18) for gap in (0.01, 0.05, 0.1, 0.3, 1.0, 10.0, 1e6)]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] == 2
    assert power_seeds(0.3, 0.0) == 2


def test_a_question_about_power_that_makes_no_sense_is_refused() -> None:
    for detect, sd in ((0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="detect > 0"):
            power_seeds(detect, sd)
    with pytest.raises(ValueError, match="more than 100000 runs"):
        power_seeds(1e-4, 1.0)


def test_holm_by_hand() -> None:
    # 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1 raised to what came before.
    assert adjusted([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert adjusted([0.03]) == [0.03]
    assert adjusted([]) == []


def test_false_discovery_control_by_hand() -> None:
    # 0.01 * 4 / 1, 0.02 * 4 / 2, 0.03 * 4 / 3 and 0.5, each no larger than the next.
    assert adjusted([0.01, 0.02, 0.03, 0.5], "bh") == pytest.approx([0.04, 0.04, 0.04, 0.5])


def test_a_correction_never_makes_a_finding_surer() -> None:
    p = np.random.default_rng(0).uniform(size=20).tolist()
    for corrected in (adjusted(p, "holm"), adjusted(p, "bh"), adjusted(p, "by")):
        assert all(q >= r for q, r in zip(corrected, p, strict=True))
        assert np.argsort(corrected, kind="stable").tolist()[0] == int(np.argmin(p))
    with pytest.raises(ValueError, match="between 0 and 1"):
        adjusted([0.1, math.nan])


def test_listing_the_ledger_imports_neither_torch_nor_scipy() -> None:
    code = "import sys, kdrun.ledger.claims, kdrun.ledger.verdict; print(sorted({'torch', 'scipy', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
