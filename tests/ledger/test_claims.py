from __future__ import annotations

import math

import pytest

from kdrun.errors import Refused
from kdrun.ledger.claims import Claim, ClaimResult, claim_problems, judge_claim, parse_claim
from kdrun.ledger.statistics import paired

ARMS: dict[str, dict[str, list[float]]] = {
    "pld": {"top1": [75.0, 75.6, 74.9], "nll": [0.80, 0.81, 0.79], "gain": [1.0, 2.0, 3.5]},
    "ce": {"top1": [73.0, 74.1, 72.9], "nll": [0.90, 0.92, 0.91], "gain": [0.0, 1.0, 2.0]},
    "kd": {"top1": [75.1, 75.2, 75.3], "nll": [0.80, 0.83, math.nan], "gain": [5.0, 5.0, 5.0]},
    "alone": {"top1": [74.0]},
}
RESULTS = {arm: {metric: dict(enumerate(values, 1)) for metric, values in metrics.items()} for arm, metrics in ARMS.items()}


def judged(text: str) -> ClaimResult:
    return judge_claim(text, RESULTS, "top1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pld > ce", ("pld", "ce", "top1", ">", 0.0)),
        ("pld.top1 > kd.top1", ("pld", "kd", "top1", ">", 0.0)),
        ("pld.nll<kd", ("pld", "kd", "nll", "<", 0.0)),
        ("pld < kd.nll", ("pld", "kd", "nll", "<", 0.0)),
        ("  pld > listmle + 3 ", ("pld", "listmle", "top1", ">", 3.0)),
        ("pld>kd-.5", ("pld", "kd", "top1", ">", -0.5)),
        ("pld.ece < ce + 1.25", ("pld", "ce", "ece", "<", 1.25)),
        ("pld_tau1 ~ ce", ("pld_tau1", "ce", "top1", "~", 0.0)),
    ],
)
def test_claims_are_read(text: str, expected: tuple[str, str, str, str, float]) -> None:
    assert parse_claim(text, "top1") == Claim(text.strip(), *expected)


@pytest.mark.parametrize(
    "text", ["", "pld", "pld >= ce", "pld > ce > kd", "pld > ce * 2", "pld > ce + ", "pld. > ce", "pld > ce + 1e3", "a > b; c"]
)
def test_what_is_not_a_claim_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Refused, match="pld > listmle"):
        parse_claim(text)


@pytest.mark.parametrize("text", ["pld.nll < ce.top1", "pld ~ ce + 1", "pld > pld", "pld > 3", "pld.top1 ~ 3", "pld.nll > pld.nll"])
def test_claims_that_compare_nothing_sensible_are_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"write|name one metric"):
        parse_claim(text)


def test_a_claim_holds_when_the_whole_interval_is_on_its_side() -> None:
    result = judged("pld > ce")
    gap = paired(RESULTS["pld"]["top1"], RESULTS["ce"]["top1"])
    assert result.holds is True
    assert (result.difference, result.low, result.high, result.n) == (gap.mean, gap.low, gap.high, 3)


def test_a_claim_fails_when_the_whole_interval_is_on_the_other_side() -> None:
    assert judged("pld < ce").holds is False
    assert judged("ce > pld").holds is False
    assert judged("ce < pld").holds is True


def test_a_claim_is_open_when_the_interval_straddles() -> None:
    result = judged("pld > kd")
    assert result.difference < 0  # a mean on the other side refutes as little as one on this side shows
    assert (judged("pld > kd").holds, judged("pld < kd").holds, judged("kd > pld").holds) == (None, None, None)


def test_a_margin_moves_the_line_and_not_the_interval() -> None:
    # pld - ce: 2.0, 1.5, 2.0; mean 1.833, interval 1.116 to 2.550.
    assert judged("pld > ce").low == pytest.approx(1.116, abs=1e-3)
    assert judged("pld > ce").high == pytest.approx(2.550, abs=1e-3)
    assert [judged(f"pld > ce + {m}").holds for m in (1, 1.8, 2.6)] == [True, None, False]
    assert [judged(f"pld < ce + {m}").holds for m in (1, 1.8, 2.6)] == [False, None, True]
    assert judged("pld > ce + 1").low == judged("pld > ce").low
    assert judged("pld > kd - 2").holds is True  # not worse by more than 2, though not shown to be better


def test_not_distinguishable_holds_when_the_interval_contains_zero() -> None:
    assert judged("pld ~ kd").holds is True
    assert judged("pld ~ ce").holds is False


def test_identical_arms_are_indistinguishable_and_neither_is_above() -> None:
    same = {"a": RESULTS["pld"], "b": RESULTS["pld"]}
    assert judge_claim("a ~ b", same).holds is True
    assert judge_claim("a > b", same).holds is None
    assert judge_claim("a < b", same).holds is None


def test_without_an_interval_nothing_is_shown_not_even_equality() -> None:
    for relation in "<>~":
        one, diverged = judged(f"alone {relation} ce"), judged(f"pld.nll {relation} kd")
        assert (one.holds, one.low, one.n) == (None, None, 1)
        assert (diverged.holds, diverged.low, diverged.n) == (None, None, 3)
        assert "1 common seed," in one.sentence
        assert "none is left out" in diverged.sentence


def test_seeds_of_one_arm_alone_do_not_count() -> None:
    more = {**RESULTS, "pld": {"top1": {**RESULTS["pld"]["top1"], 4: 0.0}}}
    assert judge_claim("pld > ce", more) == judged("pld > ce")
    assert math.isnan(judge_claim("a > b", {"a": {"top1": {1: 1.0}}, "b": {"top1": {2: 1.0}}}).difference)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pld > ce", "pld beats ce by 1.83 points (95 % interval 1.12 to 2.55, 3 seeds, paired)"),
        ("ce > pld", "refuted: pld beats ce by 1.83 points (95 % interval 1.12 to 2.55, 3 seeds, paired)"),
        (
            "pld > ce + 1",
            "pld beats ce by 1.83 points (95 % interval 1.12 to 2.55, 3 seeds, paired); claimed: pld minus ce above +1.00 points",
        ),
        (
            "pld > kd",
            "not shown, too few seeds or no difference: pld minus kd is -0.03 points (95 % interval -1.04 to +0.97, 3 seeds, paired)",
        ),
        ("pld ~ kd", "pld and kd cannot be told apart: pld minus kd is -0.03 points (95 % interval -1.04 to +0.97, 3 seeds, paired)"),
        ("pld ~ ce", "pld and ce differ: pld beats ce by 1.83 points (95 % interval 1.12 to 2.55, 3 seeds, paired)"),
        ("pld.nll < ce", "pld beats ce in nll by 0.1100 nats (95 % interval 0.0852 to 0.1348, 3 seeds, paired)"),
        ("pld.gain > ce", "pld lies above ce in gain by 1.167 (95 % interval 0.4496 to 1.884, 3 seeds, paired)"),
        ("alone > ce", "not shown: alone and ce have 1 common seed, and an interval needs two"),
    ],
)
def test_the_sentence_is_for_people(text: str, sentence: str) -> None:
    assert judged(text).sentence == sentence


def test_a_lower_loss_beats_a_higher_one_in_the_sentence() -> None:
    assert judged("ce.nll > pld").sentence.startswith("pld beats ce in nll by 0.1100")


def test_unknown_arms_and_metrics_come_with_the_nearest() -> None:
    with pytest.raises(Refused, match="did you mean pld"):
        judged("pdl > ce")
    with pytest.raises(Refused, match="did you mean nll"):
        judged("pld.nl < ce")
    with pytest.raises(Refused) as refused:
        judged("foo > bar")
    assert len(refused.value.problems) == 2


def test_all_faults_of_a_recipes_claims_are_found_before_a_run() -> None:
    problems = claim_problems(["pld > ce", "pld >> ce", "pdl > ce", "pld.top2 > kd"], ARMS, ["top1", "top5"])
    assert [p.key for p in problems] == ["claims"] * 3
    assert ["not a claim" in p.what for p in problems] == [True, False, False]
    assert "did you mean pld" in problems[1].remedy
    assert "did you mean" in problems[2].remedy


def test_a_metric_is_held_against_a_number() -> None:
    result = judged("ce.nll > 0.1")
    values = list(RESULTS["ce"]["nll"].values())
    assert result.holds is True
    assert result.difference == pytest.approx(sum(values) / len(values))
    assert result.sentence.startswith("ce.nll is ")
    assert result.sentence.endswith("claimed: above 0.1000 nats")
    assert judged("ce.nll < 0.1").holds is False
    assert judged("ce.nll < 0.1").sentence.startswith("refuted: ")


def test_a_metric_is_held_against_a_multiple_of_the_others() -> None:
    assert judged("pld.nll < 0.5 ce").holds is False
    halves = {seed: RESULTS["pld"]["nll"][seed] - 0.5 * RESULTS["ce"]["nll"][seed] for seed in RESULTS["pld"]["nll"]}
    assert judged("pld.nll > 0.5 ce").difference == pytest.approx(sum(halves.values()) / len(halves))


def test_two_metrics_of_one_arm_are_compared() -> None:
    result = judged("pld.top1 > pld.nll")
    assert result.holds is True
    assert result.sentence.startswith("pld.top1 minus pld.nll is +")
