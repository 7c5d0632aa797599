"""A contextual stochastic block model: a graph whose edges know the classes better than its features do.

The model: Deshpande, Sen, Montanari, Mossel, "Contextual Stochastic Block Models", NeurIPS 2018, arXiv 1807.09596. Sizes and
constants are ours: an MLP on the features alone is right at about two nodes in three, a graph network at nearly nine in ten.

    y_i = i mod C,   x_i = mu_(y_i) * signal * sqrt(D) / 2 + N(0, I),   |mu_c| = 1
    edges: a node uniformly, its partner uniformly inside the class with probability `homophily` and else uniformly outside it;
    no loops, duplicates dropped, until there are `edges` of them
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.graph import Graph, Setting, check_setting, graph_data, random_parts, undirected


@dataclass
class CSBMData:
    """One graph of one seed: its means, features, edges and the division of its nodes."""

    name: str = "csbm"
    nodes: int = 1000
    classes: int = 6
    features: int = 48
    edges: int = 2500
    homophily: float = 0.65
    signal: float = 0.6
    labelled: int = 20
    validation: int = 300
    setting: Setting = "transductive"
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_setting(self.setting, self.held_out)
        for key in ("features", "edges", "labelled", "validation"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if not 2 <= self.classes <= self.nodes // 2:
            raise ValueError(f"classes={self.classes} must be at least 2, with at least 2 of {self.nodes} nodes each")
        if not 0 < self.homophily < 1:
            raise ValueError(f"homophily={self.homophily} is a probability, between 0 and 1")
        if self.edges > self.nodes * (self.nodes // self.classes - 1) // 4:  # beyond half of the pairs inside classes it takes for ever
            raise ValueError(f"edges={self.edges} is too many for {self.nodes} nodes in {self.classes} classes")

    def load(self) -> Data:
        """Draw the graph. Raises `Refused` where it has too few nodes for its parts."""
        labels = torch.arange(self.nodes) % self.classes
        graph = Graph(self._features(labels), labels, undirected(self._pairs(labels), self.nodes))
        parts = random_parts(labels, self.labelled, self.validation, None, rng.key(self.seed, "csbm", "parts"))
        return graph_data(self.name, graph, parts, self.setting, self.held_out, self.seed)

    def _features(self, labels: Tensor) -> Tensor:
        source = rng.generator(rng.key(self.seed, "csbm", "features"))
        means = torch.randn(self.classes, self.features, generator=source, dtype=torch.float64)
        means = means / means.norm(dim=1, keepdim=True) * self.signal * math.sqrt(self.features) / 2
        noise = torch.randn(self.nodes, self.features, generator=source, dtype=torch.float64)
        return (means[labels] + noise).to(torch.float32)

    def _pairs(self, labels: Tensor) -> Tensor:
        """[2, edges], each unordered pair once."""
        source = rng.generator(rng.key(self.seed, "csbm", "edges"))
        found: dict[tuple[int, int], None] = {}  # in the order in which they were drawn
        while len(found) < self.edges:
            first = torch.randint(self.nodes, (self.edges,), generator=source)
            inside = torch.rand(self.edges, generator=source) < self.homophily
            second = torch.where(inside, _inside(first, self.nodes, self.classes, source), _outside(labels, first, source))
            found |= dict.fromkeys(zip(torch.minimum(first, second).tolist(), torch.maximum(first, second).tolist(), strict=True))
        return torch.tensor(list(found)[: self.edges]).T


def _inside(first: Tensor, nodes: int, classes: int, source: torch.Generator) -> Tensor:
    """For every node another one of its class, uniformly. The members of class c are c, c + C, c + 2 C, ..."""
    label, place = first % classes, first // classes
    others = (nodes - 1 - label) // classes  # members of the class but the node itself
    drawn = (torch.rand(len(first), generator=source, dtype=torch.float64) * others).long()
    return label + classes * (drawn + (drawn >= place))


def _outside(labels: Tensor, first: Tensor, source: torch.Generator) -> Tensor:
    """For every node one of another class, uniformly."""
    place = torch.rand(len(first), generator=source, dtype=torch.float64)
    second = torch.empty_like(first)
    for c in range(int(labels.max()) + 1):
        mine = labels[first] == c
        strangers = torch.nonzero(labels != c).flatten()
        second[mine] = strangers[(place[mine] * len(strangers)).long()]
    return second
