"""Events and what follows from them: a commonsense graph whose truth is known, and the noisy web that speaks of it. Ours.

    verb object relation -> tail          every one a token

Verbs and objects have hidden classes; three tails are valid for (relation, verb class, object class) and no others. The web says
something valid of the event, or, with probability `noise`, of an event of other classes, which may be valid of this one by chance.
A human graph of the same world is cleaner and much smaller. Test events occur in neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import Ragged, TokenSplit
from kdrun.dataset.vocabulary import Symbols

HEAD = "head"  # row of extra [N] int64: the number of the event; what is cut into parts keeps the rows of an event together
LENGTH = 4  # tokens of a row
Graph = Literal["web", "human"]


@dataclass(frozen=True, eq=False)
class World:
    """The truth."""

    verb_class: Tensor  # [verbs]
    object_class: Tensor  # [objects]
    valid: Tensor  # [relations, groups, groups, valid] tails by relation, verb class, object class

    def pairs(self, verbs: Tensor, objects: Tensor) -> Tensor:
        """The class pairs of events, as one number."""
        return self.verb_class[verbs] * self.valid.shape[2] + self.object_class[objects]

    def tails(self, relations: Tensor, pairs: Tensor) -> Tensor:
        """Valid tails [..., valid]."""
        return self.valid.flatten(1, 2)[relations, pairs]


@dataclass(frozen=True)
class Oracle:
    """Whether a completion is valid of its prompt, 1 or 0."""

    valid: frozenset[tuple[int, ...]]  # all valid rows, as tokens

    def __call__(self, prompt: list[int], written: list[int]) -> float:
        return float((*prompt, *written) in self.valid)


@dataclass
class EventData:
    """`web_events` of the verbs x objects events are spoken of, `per_cell` times for each relation; the others are for testing."""

    name: str = "events"
    graph: Graph = "web"
    verbs: int = 30
    objects: int = 30
    relations: int = 5
    tails: int = 60
    groups: int = 6
    valid: int = 3
    web_events: int = 720
    per_cell: int = 10
    noise: float = 0.28
    human_events: int = 70
    human_per_cell: int = 3
    human_noise: float = 0.13
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("relations", "groups", "valid", "per_cell", "human_per_cell"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key, low, high in (
            ("verbs", self.groups, 10**4),
            ("objects", self.groups, 10**4),
            ("tails", self.valid, 10**4),
            ("web_events", 1, self.verbs * self.objects - 1),
            ("human_events", 1, self.web_events),
            ("noise", 0, 1),
            ("human_noise", 0, 1),
        ):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key}={getattr(self, key)}: legal range [{low}, {high}]")
        if self.graph not in get_args(Graph):
            raise ValueError(f"graph={self.graph!r}: legal values {', '.join(get_args(Graph))}")
        if self.groups == 1 and (self.noise or self.human_noise):
            raise ValueError("groups=1: noise is what is valid of other classes; groups=2 at least, or noise=0 human_noise=0")

    def world(self) -> World:
        """Balanced random classes, and distinct valid tails drawn for every cell, so that cells may share some."""
        key = rng.key(self.seed, "events", "world")
        cells = torch.arange(self.relations * self.groups**2)
        order = rng.bits(rng.key(key, "tails"), cells[:, None], torch.arange(self.tails)).argsort(1)
        return World(
            rng.permutation(rng.key(key, "verbs"), self.verbs) % self.groups,
            rng.permutation(rng.key(key, "objects"), self.objects) % self.groups,
            order[:, : self.valid].view(self.relations, self.groups, self.groups, self.valid),
        )

    def load(self) -> Data:
        """Draw the graph to train on, and one valid tail for every relation of every test event."""
        world, events = self.world(), rng.permutation(rng.key(self.seed, "events", "split"), self.verbs * self.objects)
        told, noise = (self.web_events, self.noise) if self.graph == "web" else (self.human_events, self.human_noise)
        per_cell = self.per_cell if self.graph == "web" else self.human_per_cell
        train = self._drawn(world, events[:told], per_cell, noise, self.graph)
        test = self._drawn(world, events[self.web_events :], 1, 0.0, "test")
        words = [f"{kind}{i}" for kind in ("verb", "object", "relation", "tail") for i in range(getattr(self, f"{kind}s"))]
        splits, first = {}, 0
        for part, rows in (("train", train), ("test", test)):
            heads = rows[:, 0] * self.objects + rows[:, 1]
            splits[part] = TokenSplit.of(self._stored(rows), torch.arange(first, first + len(rows)), None, **{HEAD: heads})
            first += len(rows)
        vocabulary, oracle = Symbols(tuple(words)), self._oracle(world)
        return Data(self.name, tuple(words), (LENGTH - 1,), (), (), splits, first, vocabulary=vocabulary, oracle=oracle)

    def _oracle(self, world: World) -> Oracle:
        cells = torch.cartesian_prod(torch.arange(self.verbs), torch.arange(self.objects), torch.arange(self.relations))
        tails = world.tails(cells[:, 2], world.pairs(cells[:, 0], cells[:, 1]))
        rows = torch.cat([cells.repeat_interleave(self.valid, 0), tails.reshape(-1, 1)], 1) + torch.tensor(self._firsts())
        return Oracle(frozenset(map(tuple, rows.tolist())))

    def _firsts(self) -> tuple[int, int, int, int]:
        """The first token of each kind."""
        return 0, self.verbs, self.verbs + self.objects, self.verbs + self.objects + self.relations

    def _drawn(self, world: World, events: Tensor, per_cell: int, noise: float, part: str) -> Tensor:
        """Rows [N, 4] of verb, object, relation, tail, each counted from 0: `per_cell` for every event and relation."""
        cells = torch.cartesian_prod(events, torch.arange(self.relations), torch.arange(per_cell))
        event, relation, copy = cells.unbind(1)
        verbs, objects = event // self.objects, event % self.objects
        draw = lambda purpose: rng.key(self.seed, "events", part, purpose)  # noqa: E731
        pairs, kinds = world.pairs(verbs, objects), self.groups**2
        if noise:
            other = (pairs + 1 + rng.integers(draw("pair"), kinds - 1, event, relation, copy)) % kinds
            pairs = torch.where(rng.uniform(draw("noisy"), event, relation, copy) < noise, other, pairs)
        which = rng.integers(draw("tail"), self.valid, event, relation, copy)
        return torch.stack([verbs, objects, relation, world.tails(relation, pairs).gather(1, which[:, None])[:, 0]], 1)

    def _stored(self, rows: Tensor) -> Ragged:
        tokens = rows + torch.tensor(self._firsts())
        place = torch.arange(LENGTH, dtype=torch.int32).repeat(len(rows))
        return Ragged(tokens.flatten().int(), place == LENGTH - 1, place, torch.arange(len(rows) + 1) * LENGTH)
