"""A repetition held against its record."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kdrun.ledger.repeat import compare, overrides_of
from kdrun.ledger.statistics import prediction_interval, summary

RUNS = {"1": 94.62875127792358, "2": 93.83886456489563, "3": 93.83886456489563}


def row(by_seed: dict[str, Any], digits: int | None = None) -> dict[str, Any]:
    told = summary([math.nan if v is None else v for v in by_seed.values()])
    kept = {k: v if v is None or digits is None else round(v, digits) for k, v in by_seed.items()}
    mean = None if math.isnan(told.mean) else told.mean
    return {"n": told.n, "mean": mean, "sd": told.sd, "low": told.low, "high": told.high, "by_seed": kept}


def record(by_seed: dict[str, Any] = RUNS, digits: int | None = None, **more: Any) -> dict[str, Any]:
    arms = {"kd": {"top1": row(by_seed, digits)}}
    return {"recipe": "kd_digits", "seeds": [int(s) for s in by_seed], "arms": arms, "method": "kd", "metric": "top1", **more}


def match(old: dict[str, Any], new: dict[str, Any]) -> str:
    (only,) = compare(old, new)
    return only.match


@pytest.mark.parametrize("digits", [None, 4])  # as records keep them now, and as they did
def test_the_same_numbers_are_equal_bit_for_bit(digits: int | None) -> None:
    assert match(record(digits=digits), record()) == "equal bit for bit"


def test_one_bit_is_a_difference_that_is_told_apart_from_equality() -> None:
    moved = {**RUNS, "3": math.nextafter(RUNS["3"], 100)}
    assert match(record(), record(moved)) == "within the prediction interval"
    assert match(record(digits=4), record({**RUNS, "3": RUNS["3"] + 1e-9})) == "equal to 4 decimals"


def test_other_numbers_are_held_against_the_prediction_interval_of_as_many_runs() -> None:
    low, high = prediction_interval(list(RUNS.values()), 3) or (0.0, 0.0)
    near, far = (dict.fromkeys(RUNS, value) for value in (high - 0.01, high + 0.01))
    (found,) = compare(record(), record(near))
    assert (found.match, found.low, found.high) == ("within the prediction interval", pytest.approx(low), pytest.approx(high))
    assert match(record(), record(far)) == "different"
    assert match(record(), record(dict.fromkeys(RUNS, low - 0.01))) == "different"


def test_some_of_the_seeds_are_held_against_those_runs() -> None:
    (found,) = compare(record(), record({"2": RUNS["2"], "3": RUNS["3"]}))
    assert (found.match, found.n, found.recorded) == ("equal bit for bit", 2, pytest.approx(RUNS["2"]))
    assert match(record(digits=4), record({"2": RUNS["2"]})) == "equal to 4 decimals"


def test_other_seeds_are_never_equal() -> None:
    assert match(record(), record({"4": RUNS["1"], "5": RUNS["2"], "6": RUNS["3"]})) == "within the prediction interval"


def test_a_record_of_one_run_has_no_interval_to_lie_in() -> None:
    one = {"1": 94.0}
    assert match(record(one), record(one)) == "equal bit for bit"
    assert match(record(one), record({"1": 94.1})) == "different"


def test_a_run_that_diverged_again_is_the_same_and_one_that_did_not_is_not() -> None:
    lost = {**RUNS, "2": None}
    assert match(record(lost), record(lost)) == "equal bit for bit"
    assert match(record(lost), record()) == "different"
    assert match(record(), record(lost)) == "different"


def test_what_the_clock_gives_and_what_was_not_measured_again_is_left_out() -> None:
    old = record()
    old["arms"]["kd"] |= {"latency_ms": row({"1": 1.0, "2": 2.0}), "nll": row({"1": 1.0})}
    old["arms"]["ce"] = {"top1": row(RUNS)}
    new = record()
    new["arms"]["kd"]["latency_ms"] = row({"1": 5.0, "2": 6.0})
    assert [(r.arm, r.metric) for r in compare(old, new)] == [("kd", "top1")]


def test_the_command_line_of_a_record_has_its_choices_arms_and_seeds() -> None:
    plain = record(chosen={"teacher": "resnet56"})
    assert overrides_of(plain) == ["recipe=kd_digits", "teacher=resnet56", "run.rivals=false", "run.seeds=[1,2,3]", "run.ledger=false"]
    plain["arms"]["ce"] = plain["arms"]["kd"]
    own = ["teacher=resnet56", "hardware.threads=1", "run.rivals=true", "run.seeds=5"]
    expected = ["recipe=kd_digits", "teacher=resnet56", "hardware.threads=1", "run.rivals=true", "run.seeds=2", "run.ledger=false"]
    assert overrides_of({**plain, "overrides": own}, seeds=2) == expected
