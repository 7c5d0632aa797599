"""A record measured again: the same arms and seeds with the present code, every mean held against the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.evaluation.metrics import kind
from kdrun.ledger.statistics import Summary, prediction_interval, summary

Match = Literal["equal bit for bit", "equal to 4 decimals", "within the prediction interval", "different"]
CLOCK = ("s", "ms")  # units of what depends on the clock and cannot come out the same
KEPT_DIGITS = 4  # older records keep the single runs to so many decimals


@dataclass(frozen=True)
class Repeated:
    """A mean of the record beside that of the repetition."""

    arm: str
    metric: str
    recorded: float  # of the record's runs; where only some of its seeds were repeated, of those
    repeated: float
    n: int  # runs of the repetition
    low: float | None  # 95 % prediction interval of the mean of n further runs, from all runs of the record; None without a spread
    high: float | None
    match: Match


def overrides_of(record: Mapping[str, Any], seeds: Sequence[int] | int | None = None) -> list[str]:
    """The command line that repeats a record: its recipe, choices and overrides, its arms, and its seeds or others."""
    chosen = [f"{group}={option}" for group, option in (record.get("chosen") or {}).items()]
    own = [o for o in record.get("overrides", chosen) if o.partition("=")[0] not in ("run.rivals", "run.seeds")]
    wanted: Any = record["seeds"] if seeds is None else seeds
    rivals = str(len(record["arms"]) > 1).lower()
    return [f"recipe={record['recipe']}", *own, f"run.rivals={rivals}", f"run.seeds={str(wanted).replace(' ', '')}", "run.ledger=false"]


def compare(record: Mapping[str, Any], document: Mapping[str, Any]) -> list[Repeated]:
    """Every mean that both have, the record's arms and metrics in their order. What the clock gives is left out."""
    found = []
    for arm, metrics in record["arms"].items():
        for metric, old in metrics.items():
            told, new = kind(metric), document["arms"].get(arm, {}).get(metric)
            if new is not None and not (told is not None and told.unit in CLOCK):
                found.append(_compared(arm, metric, old, new))
    return found


def _compared(arm: str, metric: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Repeated:
    before = {seed: _value(v) for seed, v in old["by_seed"].items()}
    after = {seed: _value(v) for seed, v in new["by_seed"].items()}
    common = [before[seed] for seed in after if seed in before]
    whole = Summary(old["n"], _value(old["mean"]), old["sd"], old["low"], old["high"])
    subset = after.keys() != before.keys() and len(common) == len(after)
    recorded, repeated = (summary(common).mean if subset else whole.mean), _value(new["mean"])
    low, high = prediction_interval(whole, len(after)) or (None, None)
    inside = low is not None and high is not None and low <= repeated <= high
    return Repeated(arm, metric, recorded, repeated, len(after), low, high, _match(before, after, recorded, repeated, inside))


def _match(before: Mapping[str, float], after: Mapping[str, float], recorded: float, repeated: float, inside: bool) -> Match:
    """`before` may hold its runs to 4 decimals only: the mean, which is kept whole, decides between the two kinds of equality."""
    if after.keys() <= before.keys() and all(_same(before[s], v) or _same(before[s], round(v, KEPT_DIGITS)) for s, v in after.items()):
        return "equal bit for bit" if _same(recorded, repeated) else "equal to 4 decimals"
    return "within the prediction interval" if inside else "different"


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _value(value: float | None) -> float:
    """A record keeps null for what was not finite."""
    return math.nan if value is None else float(value)
