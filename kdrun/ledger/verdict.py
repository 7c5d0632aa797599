"""Whether a published number was reproduced.

The published side decides the test. Mean, n and spread known: Welch's interval of the difference of two means. One number
alone: does it fall where one further run of ours would (prediction interval)? A mean of n runs without its spread: where
the mean of n further runs of ours would, which takes our spread for theirs. No number for this size: the claimed direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.errors import Problem, Refused
from kdrun.ledger.claims import ClaimResult
from kdrun.ledger.statistics import Summary, prediction_interval, summary, welch

Name = Literal["reproduced", "better", "worse", "direction only", "underpowered", "not attempted", "impossible here"]
FEWEST_RUNS = 3  # the ledger gives no verdict on fewer


@dataclass(frozen=True)
class Verdict:
    """A verdict and, in one sentence with its numbers, why."""

    name: Name
    reason: str


def judge(
    measured: Sequence[float] | Summary,
    published: Mapping[str, Any] | None,
    *,
    scale: Literal["paper", "bench"] = "paper",
    claims: Sequence[ClaimResult] = (),
    margin: float = 0.0,
    higher_is_better: bool = True,
    impossible: str | None = None,
) -> Verdict:
    """The verdict on the runs of one recipe.

    `published` holds `value`, and where the paper says so `n` (runs) and `spread` (their standard deviation). `margin`, in
    the metric's unit, is how far the interval may miss the published number and still reproduce it (a number printed
    with one decimal: 0.05). At scale "bench" the published number belongs to another experiment and is not looked at.
    `impossible`: why this cannot run here. Raises `Refused` for a published entry that cannot be read.
    """
    if impossible is not None:
        return Verdict("impossible here", impossible)
    if not isinstance(measured, Summary):
        if not measured:
            return Verdict("not attempted", "no run was made")
        measured = summary(measured)
    if measured.n < FEWEST_RUNS:
        return Verdict("underpowered", f"{_runs(measured.n)} measured; a verdict needs {FEWEST_RUNS}")
    if published is None or scale == "bench":
        return _direction(claims)
    if measured.sd is None:
        return Verdict("underpowered", f"not all of {measured.n} runs gave a finite number, and none is left out: no interval exists")
    low, high, comparison = _interval(measured, *_read(published))
    if low <= margin and high >= -margin:
        return Verdict("reproduced", comparison)
    return Verdict("better" if (low > margin) == higher_is_better else "worse", comparison)


def _interval(ours: Summary, value: float, n: int | None, spread: float | None) -> tuple[float, float, str]:
    """The 95 % interval of ours minus published, and the comparison in words."""
    mean = f"ours {_number(ours.mean)} (n = {ours.n}, sd {_number(ours.sd or 0.0)})"
    if n is not None and n > 1 and spread is not None:
        difference = welch(ours, Summary(n, value, spread, None, None))
        assert difference.low is not None  # both sides have a spread
        assert difference.high is not None
        words = f"{mean} minus published {_number(value)} (n = {n}, sd {_number(spread)}) is {_number(difference.mean, True)}"
        words += f", 95 % interval {_number(difference.low, True)} to {_number(difference.high, True)} (Welch)"
        return difference.low, difference.high, words
    runs = n or 1
    interval = prediction_interval(ours, runs)
    assert interval is not None  # the caller has seen to a spread
    low, high = interval
    what = "one further run" if runs == 1 else f"the mean of {runs} further runs"
    words = f"published {_number(value)}, {mean}; 95 % prediction interval of {what} {_number(low)} to {_number(high)}"
    return low - value, high - value, words


def _direction(claims: Sequence[ClaimResult]) -> Verdict:
    """Without a number to compare with: whether every claimed direction shows."""
    if not claims:
        return Verdict("not attempted", "there is neither a published number at this scale nor a claim to compare with")
    by_answer: dict[bool | None, list[str]] = {False: [], None: [], True: []}
    for claim in claims:
        by_answer[claim.holds].append(claim.sentence)
    if by_answer[False]:
        return Verdict("worse", "; ".join(by_answer[False]))
    if by_answer[None]:
        return Verdict("underpowered", "; ".join(by_answer[None]))
    return Verdict("direction only", "; ".join(by_answer[True]))


def _read(published: Mapping[str, Any]) -> tuple[float, int | None, float | None]:
    value, n, spread = (published.get(key) for key in ("value", "n", "spread"))
    remedy = "e.g. {value: 76.32, n: 5, spread: 0.2}; leave out n and spread if the paper does not say"
    problems = []
    if not _finite(value):
        problems.append(Problem(f"is not a number: {value!r}", "published.value", "", remedy))
    if n is not None and not (isinstance(n, int) and n >= 1):
        problems.append(Problem(f"is not a count of runs: {n!r}", "published.n", "", remedy))
    if spread is not None and not (_finite(spread) and spread >= 0):
        problems.append(Problem(f"is not a standard deviation: {spread!r}", "published.spread", "", remedy))
    if problems:
        raise Refused(problems)
    return float(value), n, None if spread is None else float(spread)  # type: ignore[arg-type]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _runs(n: int) -> str:
    return f"{n} run" if n == 1 else f"{n} runs"


def _number(value: float, signed: bool = False) -> str:
    digits = 2 if value == 0 or abs(value) >= 0.1 else 4
    return f"{value:{'+' if signed else ''}.{digits}f}"
