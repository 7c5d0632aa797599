"""Spaces of architectures to choose a student from: what there is, what is near what, what it costs, how it is configured.

S1 of DisWOT (Dong, Li, Wei, CVPR 2023, arXiv 2303.15678): depths {1, 3, 5, 7} for each of three stages, widths 16-16-32-64.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrun import rng
from kdrun.errors import Problem, Refused, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """One network of a space: blocks of each stage; channels of the stem and of each stage."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Blocks in all."""
        return sum(self.depths)


@dataclass(frozen=True)
class StageSpace:
    """Every stage chooses its depth, the whole network one row of widths (stem and stages): decisions that are free of each other.

    Raises ValueError where that is no space, in the form `space=...: legal ...`.
    """

    depths: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) < len(self.depths):
            raise ValueError(f"space={list(self.depths)}: legal depths are different numbers from 1")
        lengths = {len(row) for row in self.widths}
        if len(lengths) != 1 or min(lengths) < 2 or min(map(min, self.widths)) < 1:
            raise ValueError("space=...: legal widths are rows of one length, of the stem and of each stage: [[16, 16, 32, 64]]")
        if len({row[0] for row in self.widths}) < len(self.widths):
            raise ValueError("space=...: legal rows of widths differ in the stem, by which an architecture is named")

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> StageSpace:
        """From {depths: [1, 3], widths: [[16, 16, 32, 64]]}. Raises ValueError for other keys and for what is no space."""
        if set(node) != {"depths", "widths"}:
            raise ValueError(f"space={dict(node)}: legal keys are depths and widths")
        return cls(tuple(node["depths"]), tuple(tuple(row) for row in node["widths"]))

    @property
    def stages(self) -> int:
        return len(self.widths[0]) - 1

    def enumerate(self) -> list[Architecture]:
        """All of it, the depth of the last stage changing first and the widths last."""
        depths = list(itertools.product(self.depths, repeat=self.stages))
        return [Architecture(blocks, widths) for widths in self.widths for blocks in depths]

    def name(self, architecture: Architecture) -> str:
        """The blocks of the stages, "135"; where widths are a choice also that of the stem, "135w8"."""
        blocks = ("" if max(self.depths) < 10 else "-").join(map(str, architecture.depths))
        return blocks if len(self.widths) == 1 else f"{blocks}w{architecture.widths[0]}"

    def find(self, name: str, key: str = "") -> Architecture:
        """The architecture of a name. Raises `Refused` with the nearest names."""
        known = {self.name(a): a for a in self.enumerate()}
        if name not in known:
            raise Refused(Problem(f"'{name}' is no architecture of the space", key, "", did_you_mean(name, known)))
        return known[name]

    def config(self, architecture: Architecture) -> dict[str, list[int]]:
        """What the student's group says of it."""
        return {"depths": list(architecture.depths), "widths": list(architecture.widths)}

    def sample(self, count: int, key: int, among: Sequence[Architecture] | None = None) -> list[Architecture]:
        """`count` different ones, each equally likely; a longer sample by the same key begins with the shorter one."""
        pool = self.enumerate() if among is None else among
        return [pool[i] for i in rng.permutation(key, len(pool))[:count].tolist()]

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """All that differ from it in one decision."""
        near = [
            Architecture((*architecture.depths[:stage], depth, *architecture.depths[stage + 1 :]), architecture.widths)
            for stage in range(self.stages)
            for depth in self.depths
        ]
        near += [Architecture(architecture.depths, widths) for widths in self.widths]
        return [other for other in near if other != architecture]

    def mutate(self, architecture: Architecture, key: int, *counters: int, within: Collection[Architecture]) -> Architecture:
        """One decision changed, to a network of `within`; where no neighbour is among these, any of them."""
        choices = [other for other in self.neighbours(architecture) if other in within] or list(within)
        return choices[int(rng.integers(key, len(choices), *counters))]
