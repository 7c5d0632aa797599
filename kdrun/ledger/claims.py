"""Claims of a recipe, as plain strings, held against the runs of its arms.

    pld > ce                 pld is above ce in the primary metric
    pld.nll < kd.nll         in another metric (said once, it counts for both arms)
    pld > listmle + 3        by more than 3, in the metric's unit
    pld_tau1 ~ ce            the two cannot be told apart
    sid.ua < 30              a metric of one arm against a number
    sfd.kept_sw < 0.5 floor  against a multiple of the other arm's
    tgeo.on_clean > tgeo.on_noisy   two metrics of one arm

A claim is held against the 95 % interval of the difference paired by seed, never against two means alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.evaluation.metrics import kind
from kdrun.ledger.statistics import LEVEL, Difference, paired

_CLAIM = re.compile(
    r"""\s* (?P<left>[A-Za-z_]\w*) (?:\.(?P<left_metric>\w+))?
        \s* (?P<relation>[<>~])
        \s* (?: (?P<number>[+-]?(?:\d+(?:\.\d+)?|\.\d+))
               | (?:(?P<factor>\d+(?:\.\d+)?|\.\d+) \s+)? (?P<right>[A-Za-z_]\w*) (?:\.(?P<right_metric>\w+))?
                 \s* (?:(?P<sign>[+-]) \s* (?P<margin>\d+(?:\.\d+)?|\.\d+))? ) \s*""",
    re.VERBOSE | re.ASCII,
)
_EXAMPLES = "write 'pld > ce', 'pld.nll < kd.nll', 'pld > listmle + 3' or 'pld ~ ce'"

Results = Mapping[str, Mapping[str, Mapping[int, float]]]  # arm, metric, seed


@dataclass(frozen=True)
class Claim:
    """left - factor * right is above (>), below (<) or not distinguishable from (~) the margin. Without `right` it is left alone."""

    text: str
    left: str
    right: str | None
    metric: str
    relation: str
    margin: float = 0.0
    factor: float = 1.0
    right_metric: str | None = None  # where it is not `metric`: two metrics of one arm

    @property
    def sides(self) -> list[tuple[str, str]]:
        """(arm, metric) of what is compared."""
        both = [(self.left, self.metric)]
        return both if self.right is None else [*both, (self.right, self.right_metric or self.metric)]


@dataclass(frozen=True)
class ClaimResult:
    """What the runs say: `holds` is None where they do not decide. The interval is of left - right, the margin not taken off."""

    text: str
    holds: bool | None
    difference: float  # NaN without a common seed
    low: float | None
    high: float | None
    n: int  # common seeds
    sentence: str


def parse_claim(text: str, primary: str = "top1") -> Claim:
    """Read a claim. Raises `Refused` with an example where it is not one."""
    match = _CLAIM.fullmatch(text)
    if match is None:
        raise _refused(f"'{text}' is not a claim", _EXAMPLES)
    found = match.groupdict()
    if found["relation"] == "~" and (found["margin"] or found["number"]):
        raise _refused(f"'{text}': '~' takes no margin", "write 'pld ~ ce', or a margin on a side: 'pld > ce - 0.5'")
    if found["number"] is not None:
        if found["left_metric"] is None:
            raise _refused(f"'{text}' compares with a number and names no metric", f"write '{found['left']}.{primary} > {found['number']}'")
        return Claim(text.strip(), found["left"], None, found["left_metric"], found["relation"], float(found["number"]))
    metrics = list(dict.fromkeys(m for m in (found["left_metric"], found["right_metric"]) if m))
    inside = found["left"] == found["right"]  # two metrics of one arm
    if len(metrics) > 1 and not inside:
        raise _refused(f"'{text}' compares two different metrics", "name one metric: 'pld.nll < kd.nll'")
    if len(metrics) < 2 and inside:
        raise _refused(f"'{text}' compares an arm with itself", _EXAMPLES)
    margin, factor = float((found["sign"] or "") + (found["margin"] or "0")), float(found["factor"] or 1)
    metric = metrics[0] if metrics else primary
    return Claim(text.strip(), found["left"], found["right"], metric, found["relation"], margin, factor, metrics[1] if inside else None)


def claim_problems(texts: Sequence[str], arms: Collection[str], metrics: Collection[str], primary: str = "top1") -> list[Problem]:
    """Everything wrong with the claims of a recipe, before any run: syntax, unknown arms, unknown metrics."""
    problems: list[Problem] = []
    for text in texts:
        try:
            claim = parse_claim(text, primary)
        except Refused as refused:
            problems.extend(refused.problems)
            continue
        problems.extend(_unknown(claim, "arm", arm, arms) for arm, _ in claim.sides if arm not in arms)
        named = dict.fromkeys(metric for _, metric in claim.sides)
        problems.extend(_unknown(claim, "metric", metric, metrics) for metric in named if metric not in metrics)
    return problems


def judge_claim(text: str, results: Results, primary: str = "top1") -> ClaimResult:
    """Hold a claim against the runs.

    `>` and `<` hold only if the interval of the paired difference lies wholly on the claimed side of the margin, fail if it
    lies wholly on the other, and are undecided between, touching included. `~` holds if the interval contains 0 and fails
    if it does not. Without an interval (fewer than two common seeds, a run that is not a finite number) all are undecided.
    Raises `Refused` for a claim that cannot be read and for arms or metrics that the results do not have.
    """
    claim = parse_claim(text, primary)
    arms = [arm for arm, _ in claim.sides if arm not in results]
    if arms:
        raise Refused([_unknown(claim, "arm", arm, results) for arm in arms])
    lacking = [(arm, metric) for arm, metric in claim.sides if metric not in results[arm]]
    if lacking:
        raise Refused([_unknown(claim, f"metric of {arm}", metric, results[arm]) for arm, metric in lacking])
    left = results[claim.left][claim.metric]
    if claim.right is None:
        gap = paired(left, dict.fromkeys(left, 0.0))
    else:
        right = results[claim.right][claim.right_metric or claim.metric]
        gap = paired(left, {seed: claim.factor * value for seed, value in right.items()})
    holds = _holds(claim, gap)
    return ClaimResult(claim.text, holds, gap.mean, gap.low, gap.high, gap.n, _Wording(claim, gap, primary).sentence(holds))


def _holds(claim: Claim, gap: Difference) -> bool | None:
    if gap.low is None or gap.high is None:
        return None
    if claim.relation == "~":
        return gap.low <= 0 <= gap.high
    above, below = gap.low > claim.margin, gap.high < claim.margin
    if not (above or below):
        return None
    return above if claim.relation == ">" else below


def _unknown(claim: Claim, what: str, name: str, legal: Collection[str]) -> Problem:
    return Problem(f"'{claim.text}' names an unknown {what}: '{name}'", "claims", "", did_you_mean(name, legal))


def _refused(what: str, remedy: str) -> Refused:
    return Refused(Problem(what, "claims", "", remedy))


class _Wording:
    """One sentence for people about a claim and its difference."""

    def __init__(self, claim: Claim, gap: Difference, primary: str) -> None:
        self.claim, self.mean, self.n = claim, gap.mean, gap.n
        self.low, self.high = (math.nan, math.nan) if gap.low is None or gap.high is None else (gap.low, gap.high)
        self.kind = kind(claim.metric)
        self.unit = "" if self.kind is None else self.kind.difference_unit
        if claim.right is None and self.unit == "points":  # a value and no difference of two
            self.unit = "percent"
        self.where = "" if claim.metric == primary else f" in {claim.metric}"

    def sentence(self, holds: bool | None) -> str:
        if self.claim.right is None or self.claim.factor != 1 or self.claim.right_metric:
            return self._general(holds)
        both = f"{self.claim.left} and {self.claim.right}"
        if math.isnan(self.low):
            return f"not shown: {self._no_interval(both)}"
        stated = self._signed() if self.low <= 0 <= self.high else self._ordered()
        if self.claim.relation == "~":
            return f"{both} cannot be told apart{self.where}: {stated}" if holds else f"{both} differ: {stated}"
        prefix = {True: "", False: "refuted: ", None: "not shown, too few seeds or no difference: "}[holds]
        return prefix + stated + self._asked()

    def _general(self, holds: bool | None) -> str:
        """For a metric against a number, a multiple, or another metric of the same arm: the difference is no arm's victory."""
        claim = self.claim
        left = f"{claim.left}.{claim.metric}"
        if claim.right is not None:
            times = "" if claim.factor == 1 else f"{claim.factor:g} "
            left += f" minus {times}{claim.right}.{claim.right_metric or claim.metric}"
        if math.isnan(self.low):
            return f"not shown: {left} over {self.n} seed{'' if self.n == 1 else 's'} has no interval"
        side = "above" if claim.relation == ">" else "below"
        sign = "" if claim.right is None else "+"
        asked = f"claimed: {side} {self._amount(claim.margin, sign)}"
        prefix = {True: "", False: "refuted: ", None: "not shown, too few seeds or no difference: "}[holds]
        return f"{prefix}{left} is {self._amount(self.mean, sign)} ({self._interval(self.low, self.high, sign)}); {asked}"

    def _no_interval(self, both: str) -> str:
        if self.n < 2:
            return f"{both} have {self.n} common seed{'' if self.n == 1 else 's'}, and an interval needs two"
        return f"not every run of {both} over {self.n} common seeds gave a finite {self.claim.metric}, and none is left out"

    def _ordered(self) -> str:
        """Who beats whom; 'lies above' where it is not known which direction is better."""
        up = self.mean > 0
        better = up if self.kind is None else up == self.kind.higher_is_better
        first, second = (self.claim.left, self.claim.right) if better else (self.claim.right, self.claim.left)
        verb = "lies above" if self.kind is None else "beats"
        low, high = (self.low, self.high) if up else (-self.high, -self.low)
        return f"{first} {verb} {second}{self.where} by {self._amount(abs(self.mean))} ({self._interval(low, high)})"

    def _signed(self) -> str:
        difference = f"{self.claim.left} minus {self.claim.right}{self.where} is {self._amount(self.mean, '+')}"
        return f"{difference} ({self._interval(self.low, self.high, '+')})"

    def _asked(self) -> str:
        """The margin of the claim, if it has one."""
        if not self.claim.margin:
            return ""
        side = "above" if self.claim.relation == ">" else "below"
        return f"; claimed: {self.claim.left} minus {self.claim.right} {side} {self._amount(self.claim.margin, '+')}"

    def _interval(self, low: float, high: float, sign: str = "") -> str:
        how = "" if self.claim.right is None else ", paired"
        return f"{100 * LEVEL:g} % interval {self._number(low, sign)} to {self._number(high, sign)}, {self.n} seeds{how}"

    def _amount(self, value: float, sign: str = "") -> str:
        return f"{self._number(value, sign)} {self.unit}".rstrip()

    def _number(self, value: float, sign: str = "") -> str:
        return format(value, sign + {"points": ".2f", "percent": ".2f", "nats": ".4f"}.get(self.unit, ".4g"))
