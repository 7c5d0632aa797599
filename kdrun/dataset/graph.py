"""Node classification on one graph: features [N, D], labels [N], edges [2, E], and which nodes are whose.

A split has the graph as far as it may be seen; its targets are -1 at all nodes but its own. Transductive: every split has
all nodes, the test nodes without their labels among them. Inductive: a share of the test nodes, with their edges, is cut off;
training and validation see what is left, and the test split is the whole graph with those nodes as its own (Hamilton et al.,
NeurIPS 2017; the share is that of GLNN, ICLR 2022, and FF-G2M, AAAI 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split
from kdrun.errors import Problem, Refused

Setting = Literal["transductive", "inductive"]


class Graph(NamedTuple):
    features: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64, -1 where unknown
    edges: Tensor  # [2, E] int64: every undirected edge in both directions, no self loops, each once, sorted


def check_setting(setting: str, held_out: float) -> None:
    """Raise ValueError for fields of a graph data set that cannot be."""
    if setting not in ("transductive", "inductive"):
        raise ValueError(f"setting={setting!r}: legal values transductive, inductive")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} is a share of the test nodes, between 0 and 1")


def undirected(pairs: Tensor, nodes: int) -> Tensor:
    """Every edge of `pairs` [2, M] in both directions, each once, without self loops, sorted. [2, E]."""
    pairs = pairs[:, pairs[0] != pairs[1]]
    both = torch.cat([pairs, pairs.flip(0)], 1)
    codes = torch.unique(both[0] * nodes + both[1])  # sorted
    return torch.stack([codes // nodes, codes % nodes])


def induced(graph: Graph, kept: Tensor) -> Graph:
    """The graph on the nodes `kept` [K] (rising), renumbered in their order, with the edges that have both ends there."""
    new = torch.full((len(graph.labels),), -1, dtype=torch.int64)
    new[kept] = torch.arange(len(kept))
    ends = new[graph.edges]
    return Graph(graph.features[kept], graph.labels[kept], ends[:, (ends >= 0).all(0)])


def random_parts(labels: Tensor, labelled: int, validation: int, test: int | None, key: int) -> dict[str, Tensor]:
    """Nodes by part: `labelled` of each class to train, then `validation` and `test` (None: all) of the others, drawn by `key`.

    Raises `Refused` where a class or the graph has too few nodes.
    """
    order = rng.permutation(key, len(labels))
    order = order[labels[order] >= 0]
    chosen = [order[labels[order] == c][:labelled] for c in range(int(labels.max()) + 1)]
    train = torch.cat(chosen)
    rest = order[~torch.isin(order, train)]
    wanted = validation + (1 if test is None else test)
    short = [c for c, nodes in enumerate(chosen) if len(nodes) < labelled]
    if short or len(rest) < wanted:
        what = f"class {short[0]} has {len(chosen[short[0]])} nodes" if short else f"{len(rest)} nodes are left, {wanted} are asked for"
        raise Refused(Problem(what, "dataset.labelled" if short else "dataset.validation", "", "ask for fewer"))
    return {"train": train, "validation": rest[:validation], "test": rest[validation:][:test]}


def graph_data(name: str, graph: Graph, parts: Mapping[str, Tensor], setting: Setting, held_out: float, seed: int) -> Data:
    """The data set of a graph whose nodes are divided into `parts` (node numbers of "train", "validation", "test").

    A node's number is its id. `held_out` and `seed`: share and draw of the test nodes that the inductive setting cuts off.
    """
    nodes = len(graph.labels)
    parts = {part: rows.sort().values for part, rows in parts.items()}
    everything = torch.arange(nodes)
    seen = everything
    if setting == "inductive":
        test = parts["test"]
        hidden = test[rng.permutation(rng.key(seed, "held-out nodes"), len(test))[: int(held_out * len(test))]]
        parts["test"] = hidden.sort().values
        seen = everything[~torch.isin(everything, hidden)]
    observed = graph if setting == "transductive" else induced(graph, seen)
    stored = {id(g): Resident(g.features) for g in (graph, observed)}
    splits = {}
    for part, rows in parts.items():
        visible, ids = (graph, everything) if part == "test" else (observed, seen)
        targets = torch.where(torch.isin(ids, rows), visible.labels, -1)
        splits[part] = Split(stored[id(visible)], targets, ids, constants={"edge_index": visible.edges})
    width = graph.features.shape[1]
    names = tuple(map(str, range(int(graph.labels.max()) + 1)))
    return Data(name, names, (width,), (0.0,) * width, (1.0,) * width, splits, nodes, whole=True)
