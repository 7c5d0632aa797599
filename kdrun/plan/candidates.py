"""The networks that a search may choose: a space on one data set, what each costs, which are within the budget."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from kdrun.config.schema import STUDENT_KEYS, TEACHER_KEYS
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.evaluation import cost
from kdrun.student.build import build
from kdrun.student.space import Architecture, StageSpace

Budget = float | Literal["median"] | None
BudgetOf = Literal["parameters", "flops"]


@dataclass(frozen=True)
class Network:
    """How a network is built: its node of the configuration, which of its keys are no arguments, which packages it may name."""

    node: Mapping[str, Any]
    reserved: Collection[str]
    allowed: Collection[str]
    key: str  # its group, for errors

    def build(self, data: Data) -> nn.Module:
        """Initialised from the global torch RNG. Raises `Refused`."""
        return build(self.node, data.classes, data.input_shape, reserved=self.reserved, allowed=self.allowed, key=self.key)

    def on_meta(self, data: Data) -> nn.Module:
        """The network without memory for its weights."""
        with torch.device("meta"):
            return self.build(data)


class Candidates:
    """The architectures of a space and their networks. Costs are counted when they are asked for: every network is built once."""

    def __init__(self, space: StageSpace, tree: Mapping[str, Any], data: Data, budget: Budget, of: BudgetOf) -> None:
        self.space, self.tree, self.data, self.budget, self.of = space, tree, data, budget, of

    @cached_property
    def parameters(self) -> dict[Architecture, int]:
        return {a: cost.parameters(self.student(a).on_meta(self.data)) for a in self.space.enumerate()}

    @cached_property
    def costs(self) -> dict[Architecture, int]:
        """What the budget is of."""
        if self.of == "parameters":
            return self.parameters
        return {a: cost.flops(self.student(a).on_meta(self.data), self.data.input_shape) for a in self.space.enumerate()}

    @cached_property
    def limit(self) -> float | None:
        return statistics.median(self.costs.values()) if self.budget == "median" else self.budget

    @cached_property
    def within(self) -> list[Architecture]:
        """Those whose cost is at most the limit, in the order of the space."""
        limit = self.limit
        return [a for a in self.space.enumerate() if limit is None or self.costs[a] <= limit]

    def student(self, architecture: Architecture) -> Network:
        return Network({**self.tree["student"], **self.space.config(architecture)}, STUDENT_KEYS, allowed(self.tree), "student")

    def teacher(self) -> Network:
        return Network(self.tree["teacher"], TEACHER_KEYS, allowed(self.tree), "teacher")

    def largest(self) -> Architecture:
        """The most parameters within the budget; of equals the first."""
        return max(self.within, key=self.parameters.__getitem__)

    def random(self, count: int, key: int) -> list[Architecture]:
        """`count` different ones, as many as there are at most; a longer list begins with the shorter one."""
        return self.space.sample(count, key, self.within)

    def named(self, candidate: str, key: int) -> Architecture:
        """The one that `largest`, `random:3` or a name stands for. Raises `Refused`, also for one outside the budget."""
        kind, _, number = candidate.partition(":")
        if candidate == "largest":
            return self.largest()
        if kind == "random":
            if not number.isdigit() or not 1 <= int(number) <= len(self.within):
                what = f"'{candidate}': the number of a random pick runs from 1 to {len(self.within)}"
                raise Refused(Problem(what, "plan.candidate", "", "plan.candidate=random:1"))
            return self.random(int(number), key)[-1]
        found = self.space.find(candidate, "plan.candidate")
        if found not in self.within:
            what = f"{candidate} costs {self.costs[found]:,}, the budget is {self.limit:,.0f}"
            raise Refused(Problem(what, "plan.candidate", "", "a smaller one, or plan.budget=null"))
        return found
