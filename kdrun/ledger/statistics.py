"""Statistics of a few runs: intervals of means and of one further run, differences of arms, seeds that a gap needs.

All intervals are two-sided, from Student's t. A run that diverged to NaN or infinity is never dropped: it leaves the
mean as it is (NaN or infinite) and no interval, so that nothing can be concluded from the runs that happened to live.
Values without any spread have an interval of width 0: all that was seen agrees, and t says no more than that.

scipy is imported where it is used: its second of import time would otherwise be paid by every listing of the ledger.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

LEVEL = 0.95
Seed = TypeVar("Seed", bound=Hashable)
# A two-arm comparison that wants more runs per arm than this is not going to be run.
MOST_SEEDS = 100_000
# Spread below so many units of float64 rounding is rounding: 76.2 three times over, or equal gaps of unequal numbers.
_ROUNDING = 16 * 2.0**-52


@dataclass(frozen=True)
class Summary:
    """n values: mean, standard deviation (n - 1; None for one value) and the 95 % interval of the mean (None for one value)."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """mean(a) - mean(b), its 95 % interval and two-sided p-value; None where the runs do not allow one."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int  # paired: common seeds; Welch: runs of both arms together


def summary(values: Sequence[float]) -> Summary:
    """Mean, spread and t-interval of the mean. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to summarise")
    n, mean, sd = len(values), _mean(values), _sd(values)
    half = None if sd is None else _t_quantile(n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, *_around(mean, half))


def prediction_interval(runs: Sequence[float] | Summary, further: int = 1) -> tuple[float, float] | None:
    """Where the mean of `further` runs of the same experiment falls, with 95 % confidence; None without a spread.

    The default asks for one run: the interval to hold against a single published number. It is wider than the interval
    of the mean, which says where the mean of infinitely many further runs lies.
    """
    s = runs if isinstance(runs, Summary) else summary(runs)
    if s.sd is None:
        return None
    half = _t_quantile(s.n - 1) * s.sd * math.sqrt(1 / further + 1 / s.n)
    return s.mean - half, s.mean + half


def paired(a: Mapping[Seed, float], b: Mapping[Seed, float]) -> Difference:
    """a - b over the seeds that both have (paired t-test); seeds of one arm alone are left out.

    No common seed: mean NaN and no interval. One: its difference and no interval. Equal differences: an interval of
    width 0, p = 1 if they are 0, else p = 0.
    """
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        return Difference(math.nan, None, None, None, 0)
    x, y = [float(a[seed]) for seed in seeds], [float(b[seed]) for seed in seeds]
    gaps = [p - q for p, q in zip(x, y, strict=True)]
    if _all_equal(gaps, max(map(abs, [*x, *y]))):
        gaps = [gaps[0]] * len(gaps)
    s = summary(gaps)
    if not s.sd:
        return Difference(s.mean, s.low, s.high, _certain(s.mean, s.sd), s.n)
    from scipy import stats

    return Difference(s.mean, s.low, s.high, float(stats.ttest_rel(x, y).pvalue), s.n)


def welch(a: Sequence[float] | Summary, b: Sequence[float] | Summary) -> Difference:
    """a - b of independent arms, which need not have one variance (Welch's t-test); from the runs, or from their summaries.

    An arm of one run has no spread: the difference comes without an interval. Two arms without any spread: an interval
    of width 0, p = 1 if they are equal, else p = 0.
    """
    a, b = (x if isinstance(x, Summary) else summary(x) for x in (a, b))
    mean, n = a.mean - b.mean, a.n + b.n
    if a.sd is None or b.sd is None:
        return Difference(mean, None, None, None, n)
    if a.sd == b.sd == 0:
        return Difference(mean, mean, mean, _certain(mean, 0.0), n)
    from scipy import stats

    # scipy gives the interval only for raw samples, and a published arm is known by its summary alone.
    variances = a.sd**2 / a.n, b.sd**2 / b.n
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / (a.n - 1) + variances[1] ** 2 / (b.n - 1))
    half = _t_quantile(freedom) * math.sqrt(sum(variances))
    p = stats.ttest_ind_from_stats(a.mean, a.sd, a.n, b.mean, b.sd, b.n, equal_var=False).pvalue
    return Difference(mean, mean - half, mean + half, float(p), n)


def power_seeds(detect: float, sd: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Runs per arm so that a true gap of `detect` is found with probability `power` (two-sided two-sample t-test, equal n).

    `sd` is the standard deviation of one arm over seeds, in the unit of `detect`. Arms that share seeds need fewer if
    the seeds move them together: `power_pairs`. At least 2. Raises ValueError for arguments out of range or beyond `MOST_SEEDS`.
    """
    return _needed(lambda n, effect: _power(2 * n - 2, n / 2 * effect**2, alpha), detect, sd, power, alpha)


def power_pairs(detect: float, sd: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Seeds that both arms share, so that a true gap of `detect` is found with probability `power` (two-sided paired t-test).

    `sd` is the standard deviation over seeds of the difference of the two arms. Otherwise as `power_seeds`.
    """
    return _needed(lambda n, effect: _power(n - 1, n * effect**2, alpha), detect, sd, power, alpha)


def _needed(reached: Callable[[int, float], float], detect: float, sd: float, power: float, alpha: float) -> int:
    """The first n at which `reached(n, effect)` is the power that is wanted."""
    if not (detect > 0 and sd >= 0 and math.isfinite(detect + sd) and 0 < alpha < power < 1):
        raise ValueError(f"needs detect > 0, sd >= 0 and 0 < alpha < power < 1, not {detect=}, {sd=}, {power=}, {alpha=}")
    candidates = range(2, MOST_SEEDS + 1)
    # Power rises with n, so the first n that suffices is found by bisection.
    at = 0 if sd == 0 else bisect.bisect_left(candidates, power, key=lambda n: reached(n, detect / sd))
    if at == len(candidates):
        raise ValueError(f"a gap of {detect:g} at a spread of {sd:g} needs more than {MOST_SEEDS} runs per arm")
    return candidates[at]


def adjusted(p_values: Sequence[float], method: Literal["holm", "bh", "by"] = "holm") -> list[float]:
    """p-values corrected for being several, in their order.

    holm: the chance of any false finding (Holm 1979). bh, by: the expected share of false ones among the findings
    (Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001, under any dependence). Raises ValueError for values
    outside [0, 1], NaN included.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie between 0 and 1, not {list(p_values)}")
    if not p_values:
        return []
    if method != "holm":
        from scipy import stats

        return [float(p) for p in stats.false_discovery_control(p_values, method=method)]
    result, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        result[i] = floor
    return result


def _mean(values: Sequence[float]) -> float:
    # fmean refuses infinities of both signs; their mean is NaN.
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def _sd(values: Sequence[float]) -> float | None:
    """None where there is no spread to speak of: one value, or one that is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return 0.0 if _all_equal(values, max(map(abs, values))) else statistics.stdev(values)


def _all_equal(values: Sequence[float], scale: float) -> bool:
    """Whether values made of numbers as large as `scale` differ by no more than rounding."""
    return math.isfinite(scale) and max(values) - min(values) <= _ROUNDING * scale


def _around(mean: float, half: float | None) -> tuple[float | None, float | None]:
    return (None, None) if half is None else (mean - half, mean + half)


def _certain(mean: float, sd: float | None) -> float | None:
    """The p-value of a difference without spread."""
    if sd is None:
        return None
    return 1.0 if mean == 0 else 0.0


def _t_quantile(freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom))


def _power(freedom: int, noncentrality: float, alpha: float) -> float:
    """Probability that a two-sided t-test rejects. `noncentrality`: the square of what t is shifted by."""
    from scipy import stats

    # t squared is F, whose one tail holds both tails of t; scipy's noncentral t gives NaN in places where F does not.
    critical = stats.f.isf(alpha, 1, freedom)
    return float(stats.ncf.sf(critical, 1, freedom, noncentrality))
