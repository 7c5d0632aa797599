"""An evolutionary search with ageing (Real et al., AAAI 2019, arXiv 1802.01548), as DisWOT uses it (CVPR 2023, arXiv 2303.15678).

The public code of DisWOT takes parents from the low end of its scores, begins with one network many times over and lets children
pass the budget; here parents come from the high end, the first population is of different networks, and all are within the budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kdrun import rng
from kdrun.student.space import Architecture, StageSpace


@dataclass(frozen=True)
class Evolution:
    """The sizes of a search. Defaults: the public code on NAS-Bench-201."""

    population: int = 36
    tournament: int = 8  # drawn from the population for every child
    parents: int = 5  # of the tournament's best: one of them, at random, is the parent
    cycles: int = 1000  # candidates in all, the first population included


@dataclass(frozen=True)
class Step:
    """One candidate of a search."""

    architecture: Architecture
    score: float
    best: float  # of all so far
    members: tuple[Architecture, ...]  # the population afterwards, the oldest first


def evolve(
    space: StageSpace, within: Sequence[Architecture], score: Callable[[Architecture], float], sizes: Evolution, key: int
) -> Iterator[Step]:
    """Search among the architectures `within` the budget; higher scores are better. Every draw is a function of `key` and the cycle."""
    inside = dict.fromkeys(within)
    members: deque[tuple[Architecture, float]] = deque(maxlen=sizes.population)  # a new one pushes the oldest out
    first = space.sample(sizes.population, rng.key(key, "population"), within)
    best = float("-inf")
    for cycle in range(sizes.cycles):
        if cycle < len(first):
            candidate = first[cycle]
        else:
            parent = _parent(list(members), sizes, key, cycle)
            candidate = space.mutate(parent, rng.key(key, "mutation"), cycle, within=inside)
        value = score(candidate)
        best = max(best, value)
        members.append((candidate, value))
        yield Step(candidate, value, best, tuple(member for member, _ in members))


def _parent(members: Sequence[tuple[Architecture, float]], sizes: Evolution, key: int, cycle: int) -> Architecture:
    """One of the best of a tournament."""
    drawn = rng.permutation(rng.key(key, "tournament"), len(members), cycle)[: sizes.tournament].tolist()
    ranked = sorted((members[i] for i in drawn), key=lambda member: member[1], reverse=True)[: sizes.parents]
    return ranked[int(rng.integers(rng.key(key, "parent"), len(ranked), cycle))][0]
