"""Scores of untrained networks: a teacher's and a student's architecture at random initialisation, one batch, one forward each.

DisWOT (Dong, Li, Wei, CVPR 2023, arXiv 2303.15678). Nothing is updated: no optimiser, no `.grad`. The gradient of the
classifier's weights, (1 / B) sum_b (softmax_b - onehot_b) f_b, needs the backward of the last layer alone, so that the rest of
the network runs without a graph. BatchNorm uses the batch's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun import rng
from kdrun.dataset.augment import local_rng
from kdrun.errors import Problem, Refused, RunFailed
from kdrun.losses.similarity import class_similarity, relation_similarity, row_normalised_gram, semantic_similarity
from kdrun.plan.base import Session
from kdrun.plan.candidates import Candidates, Network
from kdrun.student.layers import init_he
from kdrun.student.space import Architecture
from kdrun.student.taps import Tapped
from kdrun.types import Batch

Init = Literal["kaiming", "normal"]
Semantic = Literal["channel", "class"]
FOLDER = "scores"  # of what a run keeps


class Side(NamedTuple):
    """What a score looks at in one network."""

    relations: Tensor  # [B, B] float64, of the last feature maps
    slopes: Tensor  # [C, D] float64, gradient of the classifier's weights


def initialise(network: nn.Module, how: Init) -> nn.Module:
    """kaiming: convolutions from N(0, 2 / fan_out), BatchNorm 1 and 0. normal: weights of convolutions and linear layers from
    N(0, 1) instead, as in the ranking scripts of DisWOT's public code. Draws from the global torch RNG."""
    init_he(network)
    if how == "normal":
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight)
    return network


def classifier(network: nn.Module, classes: int, key: str) -> nn.Linear:
    """The last linear layer, which must speak of the classes. Raises `Refused` where there is none."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not layers or layers[-1].out_features != classes:
        remedy = "a network that ends in torch.nn.Linear, e.g. student=stage_resnet, teacher=resnet56"
        raise Refused(Problem(f"{type(network).__name__} does not end in a linear layer of {classes} classes", key, "", remedy))
    return layers[-1]


def look(network: nn.Module, taps: Mapping[str, str], tap: str, batch: Batch, classes: int, key: str) -> Side:
    """What a network at its initialisation shows on a batch. No parameter changes; BatchNorm's running statistics do."""
    network.train().requires_grad_(False)
    weight = classifier(network, classes, key).weight.requires_grad_(True)
    logits, taken = Tapped(network, taps, (tap,), f"{key}.taps")(batch.inputs, batch.extra)
    (slopes,) = torch.autograd.grad(F.cross_entropy(logits.double(), batch.targets), weight)
    return Side(row_normalised_gram(taken[tap].detach()).cpu(), slopes.double().cpu())


def likeness(teacher: Side, student: Side, semantic: Semantic) -> tuple[float, float]:
    """(M_r, M_s) of a student. Raises `RunFailed` where they are no numbers."""
    of_classes = semantic_similarity if semantic == "channel" else class_similarity
    found = float(relation_similarity(teacher.relations, student.relations)), float(of_classes(teacher.slopes, student.slopes))
    if not all(map(math.isfinite, found)):
        raise RunFailed(f"the scores of a candidate are {found}: its features or its gradient are not finite")
    return found


@dataclass(eq=False)
class Scorer:
    """Scores of candidates by name of the score: "parameters", "depth", "random", and if `compares` also "m_r", "m_s", "sum".

    The similarities are means over `inits` pairs of initialisations, each with a batch of its own. The teacher's side is made
    once; it and every candidate's scores are kept in the run's folder.
    """

    session: Session
    candidates: Candidates
    batch: int
    inits: int
    init: Init
    tap: str
    semantic: Semantic
    compares: bool

    def __post_init__(self) -> None:
        self._seed = int(self.session.tree["seed"])
        self._teacher: list[Side] | None = None
        self._batches: list[Batch] = []
        self.known: dict[Architecture, dict[str, float]] = {}  # in the order in which they were asked for

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        if architecture not in self.known:
            self.known[architecture] = self._plain(architecture) | (self._similarities(architecture) if self.compares else {})
        return self.known[architecture]

    def _plain(self, architecture: Architecture) -> dict[str, float]:
        number = self.candidates.space.enumerate().index(architecture)
        draw = float(rng.uniform(rng.key(self._seed, "search", "random score"), number))
        return {"parameters": self.candidates.parameters[architecture], "depth": architecture.depth, "random": draw}

    def _similarities(self, architecture: Architecture) -> dict[str, float]:
        name = self.candidates.space.name(architecture)
        kept: dict[str, Any] = self.session.kept(f"{FOLDER}/{name}", lambda: self._compare(architecture, name))
        m_r, m_s = (math.fsum(kept[kind]) / self.inits for kind in ("m_r", "m_s"))
        return {"m_r": m_r, "m_s": m_s, "sum": m_r + m_s}

    def _compare(self, architecture: Architecture, name: str) -> dict[str, Any]:
        pairs = zip(self._sides(), self._looks(self.candidates.student(architecture), name), strict=True)
        found = [likeness(teacher, student, self.semantic) for teacher, student in pairs]
        return {"m_r": [m_r for m_r, _ in found], "m_s": [m_s for _, m_s in found]}

    def _sides(self) -> list[Side]:
        """The teacher's, one for each initialisation."""
        if self._teacher is None:
            kept = self.session.kept(
                f"{FOLDER}/teacher", lambda: {"sides": [tuple(s) for s in self._looks(self.candidates.teacher(), "teacher")]}
            )
            self._teacher = [Side(*side) for side in kept["sides"]]
        return self._teacher

    def _looks(self, network: Network, name: str) -> list[Side]:
        data, device = self.candidates.data, self.session.device
        self._batches = self._batches or [self._draw(number) for number in range(self.inits)]
        found = []
        for number, batch in enumerate(self._batches):
            with local_rng(rng.key(self._seed, "search", name, number)):
                module = initialise(network.build(data), self.init).to(device)
                found.append(look(module, network.node.get("taps") or {}, self.tap, batch, data.classes, network.key))
        return found

    def _draw(self, number: int) -> Batch:
        """Training rows as they are evaluated, drawn by (seed, number)."""
        data = self.candidates.data
        index = rng.permutation(rng.key(self._seed, "search", "batch"), len(data.split("train")), number)[: self.batch]
        return data.rows("train", index, torch.zeros_like(index), self._seed, augment=False, device=self.session.device)
