from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from kdrun.errors import Refused
from kdrun.ledger.claims import ClaimResult
from kdrun.ledger.statistics import summary
from kdrun.ledger.verdict import Name, judge

# Top-1 of five public runs of DKD (Zhao et al., CVPR 2022), ResNet-32x4 to ResNet-8x4 on CIFAR-100 (mdistiller, issue 7),
# for which 76.32 is published.
RUNS = [76.20, 75.80, 75.89, 75.85, 76.15]
CLAIM = 76.32


def claim(holds: bool | None, sentence: str = "said") -> ClaimResult:
    return ClaimResult("a > b", holds, 0.0, -1.0, 1.0, 3, sentence)


def test_a_single_published_number_is_held_against_the_prediction_interval() -> None:
    verdict = judge(RUNS, {"value": CLAIM})
    assert verdict.name == "reproduced"
    assert "75.42 to 76.54" in verdict.reason
    # The interval of the mean ends at 76.21: it would have called the same number unreached.
    assert (summary(RUNS).high or 0) < CLAIM


@pytest.mark.parametrize(
    ("spread", "name"),
    [(0.0, "worse"), (0.1, "worse"), (0.2, "worse"), (0.3, "reproduced"), (0.5, "reproduced")],
)
def test_a_published_mean_with_its_spread_is_held_against_welchs_interval(spread: float, name: str) -> None:
    verdict = judge(RUNS, {"value": CLAIM, "n": 5, "spread": spread})
    assert verdict.name == name
    assert "Welch" in verdict.reason


def test_the_reason_states_the_interval() -> None:
    assert judge(RUNS, {"value": CLAIM, "n": 5, "spread": 0.1}).reason == (
        "ours 75.98 (n = 5, sd 0.18) minus published 76.32 (n = 5, sd 0.10) is -0.34, 95 % interval -0.57 to -0.11 (Welch)"
    )


def test_a_published_mean_without_spread_is_held_against_the_mean_of_as_many_runs() -> None:
    # 75.978 +- 2.776 * 0.1835 * sqrt(1/5 + 1/5) = 75.66 to 76.30: narrower than for one run.
    verdict = judge(RUNS, {"value": CLAIM, "n": 5})
    assert verdict.name == "worse"
    assert "mean of 5 further runs 75.66 to 76.30" in verdict.reason
    assert judge(RUNS, {"value": 76.29, "n": 5}).name == "reproduced"


def test_one_published_run_has_no_spread_whatever_is_printed() -> None:
    assert judge(RUNS, {"value": CLAIM, "n": 1, "spread": 0.1}) == judge(RUNS, {"value": CLAIM})
    assert judge(RUNS, {"value": CLAIM, "spread": 0.1}) == judge(RUNS, {"value": CLAIM})


def test_above_is_better_and_below_is_worse_unless_lower_is_better() -> None:
    for published in ({"value": 70.0}, {"value": 70.0, "n": 3, "spread": 0.2}):
        assert judge(RUNS, published).name == "better"
        assert judge(RUNS, published, higher_is_better=False).name == "worse"
    assert judge(RUNS, {"value": 80.0}).name == "worse"
    assert judge(RUNS, {"value": 80.0}, higher_is_better=False).name == "better"


def test_a_margin_forgives_what_rounding_of_the_print_hides() -> None:
    runs = [70.0, 70.1, 70.2]  # prediction 69.60 to 70.60
    assert judge(runs, {"value": 70.63}).name == "worse"
    assert judge(runs, {"value": 70.63}, margin=0.05).name == "reproduced"
    assert judge(runs, {"value": 69.57}).name == "better"
    assert judge(runs, {"value": 69.57}, margin=0.05).name == "reproduced"


def test_a_summary_is_judged_as_its_runs_are() -> None:
    for published in ({"value": CLAIM}, {"value": CLAIM, "n": 5, "spread": 0.2}):
        assert judge(summary(RUNS), published) == judge(RUNS, published)


@pytest.mark.parametrize("runs", [[76.3], [76.3, 76.4]])
def test_fewer_than_three_runs_are_underpowered(runs: list[float]) -> None:
    assert judge(runs, {"value": CLAIM}).name == "underpowered"
    assert judge(runs, {"value": 10.0}).name == "underpowered"
    assert judge(runs, None, scale="bench", claims=[claim(True)]).name == "underpowered"


def test_a_diverged_run_gives_no_verdict_by_leaving_it_out() -> None:
    verdict = judge([*RUNS, math.nan], {"value": CLAIM})
    assert verdict.name == "underpowered"
    assert "none is left out" in verdict.reason


def test_runs_without_spread_reproduce_only_their_own_number() -> None:
    assert judge([76.2] * 3, {"value": 76.2}).name == "reproduced"
    assert judge([76.2] * 3, {"value": 76.3}).name == "worse"
    assert judge([76.2] * 3, {"value": 76.2, "n": 3, "spread": 0.0}).name == "reproduced"


def test_at_bench_scale_a_claim_that_holds_is_a_direction() -> None:
    verdict = judge(RUNS, None, scale="bench", claims=[claim(True, "a beats b"), claim(True, "c beats d")])
    assert (verdict.name, verdict.reason) == ("direction only", "a beats b; c beats d")


def test_at_bench_scale_the_published_number_is_not_looked_at() -> None:
    assert judge(RUNS, {"value": 10.0}, scale="bench", claims=[claim(True)]).name == "direction only"


def test_one_claim_that_fails_or_is_not_shown_decides() -> None:
    claims = [claim(True, "held"), claim(None, "open"), claim(False, "failed")]
    assert judge(RUNS, None, claims=claims[:2]) == judge(RUNS, None, claims=claims[1::-1])
    verdict = judge(RUNS, None, claims=claims[:2])
    assert (verdict.name, verdict.reason) == ("underpowered", "open")
    verdict = judge(RUNS, None, claims=claims)
    assert (verdict.name, verdict.reason) == ("worse", "failed")


def test_nothing_run_or_nothing_to_compare_with_is_not_attempted() -> None:
    assert judge([], {"value": CLAIM}).name == "not attempted"
    assert judge(RUNS, None).name == "not attempted"


def test_what_cannot_run_here_says_why() -> None:
    verdict = judge([], {"value": CLAIM}, impossible="needs 8 GPUs of 80 GB")
    assert (verdict.name, verdict.reason) == ("impossible here", "needs 8 GPUs of 80 GB")


@pytest.mark.parametrize(
    ("name", "runs", "published", "more"),
    [
        ("reproduced", RUNS, {"value": CLAIM}, {}),
        ("worse", RUNS, {"value": 76.55}, {}),  # above the prediction interval, which ends at 76.54
        ("better", RUNS, {"value": 75.41}, {}),  # below it, which begins at 75.42
        ("direction only", RUNS, None, {"claims": [claim(True)]}),
        ("underpowered", RUNS[:2], {"value": CLAIM}, {}),
        ("not attempted", [], {"value": CLAIM}, {}),
        ("impossible here", [], {"value": CLAIM}, {"impossible": "no GPU"}),
    ],
)
def test_every_verdict_of_five_public_runs(name: str, runs: list[float], published: dict[str, float] | None, more: dict[str, Any]) -> None:
    assert judge(runs, published, **more).name == name


def test_an_unreadable_published_entry_is_refused_with_all_its_faults() -> None:
    with pytest.raises(Refused) as refused:
        judge(RUNS, {"value": "76,32", "n": 0, "spread": -1})
    assert [p.key for p in refused.value.problems] == ["published.value", "published.n", "published.spread"]
    with pytest.raises(Refused, match=r"published\.value"):
        judge(RUNS, {"n": 5})


def test_the_names_are_the_ledgers() -> None:
    expected = {"reproduced", "better", "worse", "direction only", "underpowered", "not attempted", "impossible here"}
    assert set(get_args(Name)) == expected
