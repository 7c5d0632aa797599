"""Runs that were measured in one way, side by side: the arms of a board, each over its seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kdrun.config.compose import LOCATION, NOT_SEMANTIC, flatten
from kdrun.evaluation.metrics import MetricKind, kind
from kdrun.ledger.leaderboard import Row, leaderboard
from kdrun.ledger.statistics import summary
from kdrun.ledger.table import ALONE, number, unit
from kdrun.report.collect import Run
from kdrun.report.parts import Point

Values = Mapping[int, float]  # by seed
MOST_KEYS_IN_A_NAME = 3


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one configuration, by seed."""

    name: str
    runs: Mapping[int, Run]
    colour: int = 0

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def alone(self) -> bool:
        """Whether it is the student that learned from labels alone: an objective that hears no teacher, be there one or not."""
        return self.first.composed.choices.get("objective") in ALONE

    @property
    def label(self) -> str:
        return f"{self.name} (student alone)" if self.alone else self.name

    @cached_property
    def done(self) -> dict[int, dict[str, Any]]:
        """Summaries by seed, of the runs that are finished."""
        return {seed: run.summary for seed, run in self.runs.items() if run.summary is not None}

    def values(self, metric: str) -> dict[int, float]:
        """A metric by seed: the primary one as its protocol has it. One that was not finite is NaN and is not left out."""
        found = {}
        for seed, told in self.done.items():
            test = told.get("test") or {}
            if metric == told["metric"]:
                found[seed] = _number(told["value"])
            elif metric in test:
                found[seed] = _number(test[metric])
        return found


@dataclass(frozen=True, eq=False)
class Board:
    """Arms of one data set, metric and protocol, the best first and those without a number last."""

    data: str
    metric: str
    protocol: str
    arms: Sequence[Arm]
    left_out: Sequence[Run] = ()  # of an arm and seed that another, later run has too

    @property
    def kind(self) -> MetricKind | None:
        return kind(self.metric)

    @cached_property
    def rows(self) -> list[Row]:
        """The leaderboard. Where the metric's direction is not known, as if more were better; the page says so."""
        values = {arm.name: arm.values(self.metric) for arm in self.arms if arm.done}
        return leaderboard(values, self.kind is None or self.kind.higher_is_better)

    @property
    def alone(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.alone and arm.done), None)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def shown(self, value: float | None, sign: str = "") -> str:
        return number(value, self.metric, sign)

    @property
    def with_unit(self) -> str:
        told = self.kind
        word = "%" if told is not None and told.unit == "percent" else unit(self.metric)
        return f"{self.metric} ({word})" if word else self.metric


def to_boards(runs: Iterable[Run]) -> list[Board]:
    """Boards in the order of their first run."""
    groups: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in runs:
        data, evaluation = run.tree["dataset"], run.tree["evaluation"]
        what = {k: v for k, v in data.items() if k in ("_target_", "name", "subset_test")}
        name = str(run.provenance.get("data", {}).get("name") or run.composed.choices.get("dataset"))
        key = (name, json.dumps(what, default=str), str(evaluation["primary"]), str(evaluation.get("protocol", "last")))
        groups.setdefault(key, []).append(run)
    return [_board(name, metric, protocol, members) for (name, _, metric, protocol), members in groups.items()]


def _board(data: str, metric: str, protocol: str, runs: Sequence[Run]) -> Board:
    by_arm: dict[str, dict[int, Run]] = {}
    left_out: list[Run] = []
    for run in runs:
        members = by_arm.setdefault(identity(run), {})
        other = members.get(run.seed)
        if other is not None:
            earlier = min(run, other, key=lambda r: (r.summary is not None, str((r.summary or {}).get("finished", ""))))
            left_out.append(earlier)
            run = other if earlier is run else run
        members[run.seed] = run
    by_seed = [dict(sorted(seeds.items())) for seeds in by_arm.values()]
    names = _names([next(iter(seeds.values())) for seeds in by_seed])
    arms = [Arm(name, seeds) for name, seeds in zip(names, by_seed, strict=True)]
    board = Board(data, metric, protocol, arms, left_out)
    place = {row.arm: i for i, row in enumerate(board.rows)}
    ordered = sorted(arms, key=lambda arm: place.get(arm.name, len(place)))
    return replace(board, arms=[replace(arm, colour=i) for i, arm in enumerate(ordered)])


def identity(run: Run) -> str:
    """What makes runs those of one arm: the whole configuration but its seed."""
    return replace(run.composed, tree={**run.tree, "seed": None}).hash()


def settings(run: Run) -> dict[str, Any]:
    """Every leaf that can change a result, but the seed."""
    tree = {k: v for k, v in run.tree.items() if k not in NOT_SEMANTIC and k not in ("seed", "cache")}
    tree["dataset"] = {k: v for k, v in tree["dataset"].items() if k not in LOCATION}
    return flatten(tree)


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys whose values are not all alike, with the value of each run (None where it has no such key)."""
    each = [settings(run) for run in runs]
    keys = dict.fromkeys(key for values in each for key in values)
    found = {key: [values.get(key) for values in each] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _names(runs: Sequence[Run]) -> list[str]:
    """A name for each arm by its first run, no two alike."""
    names = [run.arm or str(run.tree.get("method") or run.composed.choices.get("objective")) for run in runs]
    names = _apart(names, [str(run.composed.recipe or "no recipe") for run in runs], lambda name, recipe: f"{recipe}: {name}")
    told: list[str] = [""] * len(runs)
    for name in {n for n in names if names.count(n) > 1}:
        alike = [i for i, n in enumerate(names) if n == name]
        keys = differing([runs[i] for i in alike])
        keys = {k: v for k, v in keys.items() if not k.endswith("._target_")} or keys
        for place, i in enumerate(alike):
            told[i] = ", ".join(f"{key}={values[place]}" for key, values in list(keys.items())[:MOST_KEYS_IN_A_NAME])
    names = _apart(names, told, lambda name, keys: f"{name} [{keys}]" if keys else name)
    return _apart(names, [run.folder.name for run in runs], lambda name, folder: f"{name} [{folder}]")


def _apart(names: Sequence[str], more: Sequence[str], join: Callable[[str, str], str]) -> list[str]:
    """Say more where a name stands twice."""
    return [join(name, m) if names.count(name) > 1 else name for name, m in zip(names, more, strict=True)]


def over_seeds(x: float, values: Sequence[float], label: str = "", weight: float = 1.0) -> Point:
    """The mean of a few runs with the 95 % t-interval where there are two or more."""
    told = summary(values)
    return Point(x, told.mean, told.low, told.high, weight, label)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
