"""Verifiers of written answers."""

from __future__ import annotations

import pytest

from kdrun.dataset.rewards import REWARDS, exact, number, reward_named
from kdrun.errors import Refused


@pytest.mark.parametrize(
    ("reference", "written", "right"),
    [
        ("She sold 48+24 = 72 clips.\n#### 72", "so the answer is 72", 1.0),
        ("#### 1,200", "1200", 1.0),
        ("#### 1,200", "It is 1,200.00 dollars", 1.0),
        ("#### -3", "3", 0.0),
        ("#### 7", "7 apples and 8 pears", 0.0),  # the last number counts
        ("#### 7", "seven", 0.0),
        ("no number", "none either", 0.0),
    ],
)
def test_the_last_number_decides(reference: str, written: str, right: float) -> None:
    assert number(reference, written) == right


def test_exact_looks_at_words_and_not_at_spaces() -> None:
    assert exact("a  b\n", "a b") == 1.0
    assert exact("a b", "a c") == 0.0


def test_mathematics_is_compared_by_meaning() -> None:
    pytest.importorskip("math_verify")
    assert reward_named("math")("$\\frac{1}{2}$", "The answer is $0.5$") == 1.0
    assert reward_named("math")("$\\frac{1}{2}$", "The answer is $0.6$") == 0.0


def test_an_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(Refused) as caught:
        reward_named("numbers")
    assert "number" in caught.value.problems[0].remedy


def test_the_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.dataset.rewards.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"kdrun\[text\]"):
        reward_named("math")
    assert reward_named("exact") is REWARDS["exact"]
