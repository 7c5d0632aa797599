"""Whether a written answer is right, by the reference text: verifiers of data sets of text. 1 or 0."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec

from kdrun.errors import Problem, Refused, did_you_mean

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(reference: str, written: str) -> float:
    """The same words, spaces aside."""
    return float(reference.split() == written.split())


def number(reference: str, written: str) -> float:
    """The same last number: GSM8K's answers end with it (#### 72)."""
    right, told = _last_number(reference), _last_number(written)
    return float(right is not None and right == told)


def math(reference: str, written: str) -> float:
    """Equal as mathematics, by the package math-verify (boxed answers, fractions, sets, expressions)."""
    from math_verify import parse, verify

    return float(verify(parse(reference), parse(written)))


REWARDS: dict[str, Callable[[str, str], float]] = {"exact": exact, "number": number, "math": math}


def reward_named(name: str) -> Callable[[str, str], float]:
    """(reference text, written text) -> 1 or 0. Raises `Refused` for an unknown name and a missing package."""
    if name not in REWARDS:
        raise Refused(Problem(f"there is no reward '{name}'", "dataset.reward", "", did_you_mean(name, REWARDS)))
    if name == "math" and find_spec("math_verify") is None:
        what = "mathematical answers are judged by the package math-verify, which is not installed"
        raise Refused(Problem(what, "dataset.reward", "", 'pip install "kdrun[text]", or dataset.reward=number'))
    return REWARDS[name]


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
