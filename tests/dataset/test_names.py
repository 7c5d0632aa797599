"""Names for PersonX and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrun.dataset.names import FIRST_NAMES, PEOPLE, QUERY, draw_names, named, scrubbed

TEXTS = [
    "PersonX gives PersonY a book",
    "PersonX's dog bites PersonY, PersonX laughs.",
    "PersonXs and APersonX are no people, PersonZ is",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("number", range(20))
def test_taking_the_names_out_gives_the_text_back(text: str, number: int) -> None:
    names = draw_names(text, 7, number)
    assert scrubbed(named(text, names), names) == text
    assert not {*re.findall(r"\w+", named(text, names))} & {*PEOPLE}


@given(st.lists(st.sampled_from([*PEOPLE, *FIRST_NAMES, "is", "Sams", ",", "'s", ".", "\n", "é"]), max_size=12), st.integers(0, 1000))
def test_any_text_comes_back_whatever_names_stand_in_it(words: list[str], number: int) -> None:
    text = " ".join(words)
    names = draw_names(text, 1, number)
    assert scrubbed(named(text, names), names) == text


def test_a_name_inside_another_word_stays() -> None:
    names = dict(zip(PEOPLE[:2], ("Sam", "Lee"), strict=True))
    assert named("PersonX saw a Samovar", names) == "Sam saw a Samovar"
    assert scrubbed("Sam saw a Samovar with Lee", names) == "PersonX saw a Samovar with PersonY"


def test_names_are_different_and_drawn_by_counters() -> None:
    drawn = [draw_names("PersonX", 3, number) for number in range(50)]
    assert all(len({*names.values()}) == 3 for names in drawn)
    assert drawn == [draw_names("PersonX", 3, number) for number in range(50)]
    assert len({tuple(names.values()) for names in drawn}) > 40
    assert len({*FIRST_NAMES}) == len(FIRST_NAMES)
    assert {*QUERY} < {*FIRST_NAMES}


def test_one_name_for_two_cannot_be_taken_back() -> None:
    with pytest.raises(ValueError, match="two people"):
        scrubbed("Sam", {"PersonX": "Sam", "PersonY": "Sam"})
    with pytest.raises(ValueError, match="free for"):
        draw_names(" ".join(FIRST_NAMES), 1, 1)
