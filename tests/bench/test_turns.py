"""Cases take turns, and what they tell is put into ratios. No time is asserted."""

from __future__ import annotations

import pytest

from kdrun.bench.turns import in_turns, middle, ratio
from kdrun.bench.vocab import CASES, LOSSES, Inputs, step
from kdrun.errors import RunFailed


def test_a_ratio_is_taken_repetition_by_repetition() -> None:
    """The machine was twice as slow in the second one: the ratio does not see it."""
    slow, fast = [{"s": 3.0}, {"s": 6.0}, {"s": 4.5}], [{"s": 1.0}, {"s": 2.0}, {"s": 1.0}]
    found = ratio(slow, fast, "s")
    assert found == (3.0, 3.0, 4.5)
    assert str(found) == "3 (3 to 4.5)"
    assert middle(slow, "s") == 4.5


def test_cases_take_turns_in_processes_of_their_own() -> None:
    order: list[str] = []
    sizes = ["--vocab", "50", "--tokens", "8", "--width", "4"]
    cases = {case: ["kdrun.bench.vocab", case, *sizes] for case in CASES}
    told = in_turns(cases, 2, lambda case, repetition: order.append(f"{case} {repetition}"))
    assert order == ["dense 0", "chunked 0", "dense 1", "chunked 1"]
    assert {case: len(each) for case, each in told.items()} == {"dense": 2, "chunked": 2}
    assert told["dense"][0]["loss"] == pytest.approx(told["chunked"][1]["loss"], rel=1e-6)
    assert told["chunked"][0]["gradient_off"] < 1e-5


def test_a_case_that_fails_says_why() -> None:
    with pytest.raises(RunFailed, match="invalid choice"):
        in_turns({"odd": ["kdrun.bench.vocab", "odd", "--vocab", "5", "--tokens", "1", "--width", "1"]}, 1)


@pytest.mark.parametrize("name", LOSSES)
def test_both_cases_are_the_same_step(name: str) -> None:
    import torch

    found = {}
    for case in CASES:
        given = Inputs(60, 200, 8, torch.device("cpu"))
        value = step(case, name, given)
        value.backward()
        found[case] = value.detach(), given.hidden.grad, given.weight.grad
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
