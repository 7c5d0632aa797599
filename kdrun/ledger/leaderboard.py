"""Arms ranked by one metric, with which of them cannot be told apart.

Every pair of arms is compared, paired by seed where they share at least two seeds and else by Welch's test, and the p-values
of all pairs are corrected together (Holm 1979). All pairs, although a reader looks at the differences to the first alone:
which arm is the first was decided by the same runs, so a correction for k - 1 comparisons would promise too much. Rows that
share a letter cannot be told apart at 5 % (the compact letter display of Piepho 2004).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from kdrun.ledger.statistics import LEVEL, Difference, Seed, adjusted, paired, summary, welch


@dataclass(frozen=True)
class Row:
    """One arm. Intervals are at 95 %; None where the runs do not allow one."""

    rank: int  # from 1; arms with the same mean share a rank
    arm: str
    n: int
    mean: float  # NaN or infinite where a run was: no run is left out
    sd: float | None
    low: float | None
    high: float | None
    gap: float | None  # this arm minus the first, over the common seeds if paired; None for the first itself
    gap_low: float | None  # the interval of this one difference, not widened for the number of arms
    gap_high: float | None
    p: float | None  # of that difference, corrected for the number of pairs that were compared
    paired: bool | None  # whether the difference is paired by seed (else Welch); None for the first
    ties: tuple[str, ...]  # letters; none for an arm without a finite mean

    @property
    def mark(self) -> str:
        """The letters as a table shows them: "a", "ab"; "a,ba" where there are more than 26."""
        return ("," if any(len(letter) > 1 for letter in self.ties) else "").join(self.ties)

    def tied_with(self, other: Row) -> bool:
        """Whether the two cannot be told apart."""
        return not set(self.ties).isdisjoint(other.ties)


def leaderboard(values: Mapping[str, Mapping[Seed, float]], higher_is_better: bool) -> list[Row]:
    """From arm -> seed -> value to rows, the best first; arms whose mean is not finite come last, as they stand.

    An arm with a single run, compared with whom it shares no second seed, is told apart from nobody.
    Raises ValueError for an arm without values.
    """
    means = {arm: summary(list(by_seed.values())) for arm, by_seed in values.items()}
    order = sorted(values, key=lambda arm: _distance(means[arm].mean, higher_is_better))
    gaps = {(a, b): _difference(values[b], values[a]) for a, b in itertools.combinations(order, 2)}
    tested = [pair for pair, (gap, _) in gaps.items() if gap.p is not None]
    corrected = dict(zip(tested, adjusted([float(gaps[pair][0].p or 0.0) for pair in tested]), strict=True))
    apart = [pair for pair, p in corrected.items() if p < 1 - LEVEL]
    ties = _letters([arm for arm in order if math.isfinite(means[arm].mean)], apart)
    rows: list[Row] = []
    for place, arm in enumerate(order, 1):
        s, first = means[arm], order[0]
        rank = rows[-1].rank if rows and s.mean == rows[-1].mean else place
        own = (rank, arm, s.n, s.mean, s.sd, s.low, s.high)
        if arm == first:
            rows.append(Row(*own, None, None, None, None, None, ties.get(arm, ())))
        else:
            gap, in_pairs = gaps[first, arm]
            rows.append(Row(*own, gap.mean, gap.low, gap.high, corrected.get((first, arm)), in_pairs, ties.get(arm, ())))
    return rows


def _difference(a: Mapping[Seed, float], b: Mapping[Seed, float]) -> tuple[Difference, bool]:
    """a - b and whether it is paired. One common seed gives no interval, so it does not count as paired where Welch has one."""
    common = sum(seed in b for seed in a)
    if common >= 2 or (common == 1 and min(len(a), len(b)) == 1):
        return paired(a, b), True
    return welch(list(a.values()), list(b.values())), False


def _distance(mean: float, higher_is_better: bool) -> float:
    """From the best, for sorting; what diverged lies beyond all others."""
    return math.inf if not math.isfinite(mean) else -mean if higher_is_better else mean


def _letters(arms: Sequence[str], apart: Sequence[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Letters by arm, so that two arms share one if and only if they are not told apart (insert and absorb, Piepho 2004)."""
    groups = [frozenset(arms)] if arms else []
    for pair in apart:
        split = dict.fromkeys(part for g in groups for part in ([g - {pair[0]}, g - {pair[1]}] if g.issuperset(pair) else [g]))
        groups = [g for g in split if not any(g < other for other in split)]
    groups.sort(key=lambda g: [i for i, arm in enumerate(arms) if arm in g])
    return {arm: tuple(_letter(i) for i, g in enumerate(groups) if arm in g) for arm in arms}


def _letter(number: int) -> str:
    """0 -> a, 25 -> z, 26 -> ba, ... as digits of base 26."""
    head, tail = divmod(number, len(ascii_lowercase))
    return (_letter(head) if head else "") + ascii_lowercase[tail]
