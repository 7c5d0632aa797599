"""The real graphs of the GNN-to-MLP papers, read by torch-geometric or from a compact archive.

Planetoid (Cora, Citeseer, Pubmed): Yang, Cohen, Salakhutdinov, ICML 2016, arXiv 1603.08861, github.com/kimiyoung/planetoid; the
public split. Coauthor and Amazon: Shchur et al., "Pitfalls of Graph Neural Network Evaluation", 2018, arXiv 1811.05868,
github.com/shchur/gnn-benchmark; random splits, drawn by the data set's seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdrun import rng
from kdrun.config.paths import kept
from kdrun.dataset.base import Data
from kdrun.dataset.graph import Graph, Setting, check_setting, graph_data, random_parts, undirected
from kdrun.errors import Problem, Refused
from kdrun.student.gnn import geometric


class Stated(NamedTuple):
    """What is published of a graph. `edges` counts both directions."""

    title: str  # what torch-geometric calls it
    nodes: int
    edges: int
    features: int
    classes: int
    file: str  # as its authors distribute it


# torch-geometric's documentation of its data sets.
PLANETOID = {
    "cora": Stated("Cora", 2708, 10556, 1433, 7, "ind.cora.x"),
    "citeseer": Stated("CiteSeer", 3327, 9104, 3703, 6, "ind.citeseer.x"),
    "pubmed": Stated("PubMed", 19717, 88648, 500, 3, "ind.pubmed.x"),
}
PITFALLS = {
    "coauthor_cs": Stated("CS", 18333, 163788, 6805, 15, "ms_academic_cs.npz"),
    "coauthor_physics": Stated("Physics", 34493, 495924, 8415, 5, "ms_academic_phy.npz"),
    "amazon_photo": Stated("Photo", 7650, 238162, 745, 8, "amazon_electronics_photo.npz"),
}
ARCHIVE = ("x_indptr", "x_indices", "x_shape", "edges", "y", "train_idx", "val_idx", "test_idx")
Parts = dict[str, Tensor]


@dataclass
class GraphFiles:
    """What the real graphs share: where they lie, and what is seen of them."""

    known: ClassVar[dict[str, Stated]]
    home: ClassVar[str]  # folder below KDRUN_DATA

    name: str
    path: str | None = None
    download: bool = False
    labelled: int = 20
    validation: int = 500
    test: int = 1000
    setting: Setting = "transductive"
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_setting(self.setting, self.held_out)
        if self.name not in self.known:
            raise ValueError(f"name={self.name!r}: legal values {', '.join(self.known)}")
        for key in ("labelled", "validation", "test"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1 node")

    @property
    def stated(self) -> Stated:
        return self.known[self.name]

    def load(self) -> Data:
        """Read the graph. Raises `Refused` where it is not at hand, or its files cannot be read."""
        return self._data(*self._read())

    def outline(self) -> Data:
        """Nodes, edges, features and classes in the published numbers, without their content: for estimates."""
        size = self.stated
        nodes = torch.arange(size.nodes)
        ring = [torch.stack([nodes, (nodes + step) % size.nodes]) for step in range(1, -(-size.edges // (2 * size.nodes)) + 1)]
        edges = undirected(torch.cat(ring, 1)[:, : size.edges // 2], size.nodes)
        features = torch.zeros(1, 1).expand(size.nodes, size.features)
        return self._data(Graph(features, nodes % size.classes, edges), None)

    def _data(self, graph: Graph, public: Parts | None) -> Data:
        parts = public or random_parts(graph.labels, self.labelled, self.validation, self.test, rng.key(self.seed, self.name, "parts"))
        return graph_data(self.name, graph, parts, self.setting, self.held_out, self.seed)

    def _read(self) -> tuple[Graph, Parts | None]:
        raise NotImplementedError

    def _folder(self) -> Path | None:
        """Where the files are looked for."""
        if self.path is not None:
            return Path(self.path)
        root = os.environ.get("KDRUN_DATA")
        return Path(root) / self.home if root else None

    def _places(self) -> Iterator[Path]:
        """The folder itself, and where torch-geometric keeps what it has downloaded into it."""
        folder = self._folder()
        if folder is not None:
            yield folder
            yield from (folder / name / "raw" for name in (self.name, self.stated.title, self.stated.title.lower()))

    def _find(self, file: str) -> Path | None:
        return next((place / file for place in self._places() if (place / file).is_file()), None)

    def _cache(self) -> str:
        return str(kept() / self.home)

    def _absent(self, files: str, origin: str) -> Refused:
        folder = self._folder()
        where = str(folder) if folder is not None else "neither dataset.path nor KDRUN_DATA is set"
        remedy = f"put {files} of {origin} into a folder: dataset.path=FOLDER; or let torch-geometric fetch them: dataset.download=true"
        return Refused(Problem(f"{self.name} is not at hand", "dataset.path", where, remedy))

    def _downloaded(self, dataset: str) -> tuple[Graph, Parts | None]:
        try:
            fetched = getattr(geometric("datasets"), dataset)(self._cache(), self.stated.title)[0]
        except (OSError, RuntimeError, ValueError) as error:
            remedy = "dataset.path=FOLDER with its files, if this machine has no network"
            raise Refused(Problem(f"{self.name} cannot be fetched: {error}", "dataset.download", "", remedy)) from error
        return self._taken(fetched)

    def _taken(self, read: object) -> tuple[Graph, Parts | None]:
        """Graph and public split, if it has one, of torch-geometric's own object."""
        features, labels, edges = (getattr(read, key) for key in ("x", "y", "edge_index"))
        graph = Graph(features.to(torch.float32), labels, undirected(edges, len(labels)))
        masks = {part: getattr(read, f"{key}_mask", None) for part, key in (("train", "train"), ("validation", "val"), ("test", "test"))}
        return graph, {part: mask.nonzero().flatten() for part, mask in masks.items() if mask is not None} or None


@dataclass
class PlanetoidData(GraphFiles):
    """Cora, Citeseer and Pubmed with the public split: 20 training nodes of each class, 500 validation and 1000 test nodes.

    Read is `<name>.npz` (a compressed sparse 0/1 matrix x_indptr, x_indices, x_shape; edges [2, E/2]; y; train_idx, val_idx,
    test_idx) or the raw files ind.<name>.* of the origin.
    """

    known = PLANETOID
    home = "planetoid"

    name: str = "cora"
    normalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, size in (("labelled", 20), ("validation", 500), ("test", 1000)):
            if getattr(self, key) != size:
                raise ValueError(f"{key}={getattr(self, key)}: the public split has {size}")

    def _data(self, graph: Graph, public: Parts | None) -> Data:
        if self.normalise:
            graph = graph._replace(features=graph.features / graph.features.sum(1, keepdim=True).clamp(min=1e-12))
        return super()._data(graph, public)

    def _read(self) -> tuple[Graph, Parts | None]:
        archive, raw = self._find(f"{self.name}.npz"), self._find(self.stated.file)
        if archive is not None:
            return read_archive(archive)
        if raw is not None:
            try:
                return self._taken(geometric("io").read_planetoid_data(str(raw.parent), self.name))
            except (OSError, ValueError, RuntimeError, EOFError) as error:
                raise Refused(Problem(f"cannot be read: {error}", "dataset.path", str(raw.parent), "fetch the files again")) from error
        if self.download:
            return self._downloaded("Planetoid")
        raise self._absent(f"{self.name}.npz, or the eight files ind.{self.name}.*", "github.com/kimiyoung/planetoid (data)")


@dataclass
class PitfallsData(GraphFiles):
    """Coauthor CS, Coauthor Physics and Amazon Photo: `labelled` nodes of each class to train, `validation` and `test` of the others,
    drawn by `seed`. Features are 0/1, as torch-geometric reads them."""

    known = PITFALLS
    home = "gnn_benchmark"

    name: str = "coauthor_cs"

    def _read(self) -> tuple[Graph, Parts | None]:
        file = self._find(self.stated.file)
        if file is not None:
            try:
                return self._taken(geometric("io").read_npz(str(file)))
            except (OSError, ValueError, KeyError) as error:
                raise Refused(Problem(f"cannot be read: {error}", "dataset.path", str(file), "fetch the file again")) from error
        if self.download:
            return self._downloaded("Amazon" if self.name.startswith("amazon") else "Coauthor")
        raise self._absent(self.stated.file, "github.com/shchur/gnn-benchmark (data/npz)")


def read_archive(file: Path) -> tuple[Graph, Parts]:
    """A graph and its public split from the compact archive. Raises `Refused` for a file that is none."""
    try:
        with np.load(file) as held:
            missing = [key for key in ARCHIVE if key not in held]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            read = {key: torch.from_numpy(held[key].astype(np.int64)) for key in ARCHIVE}
    except (OSError, ValueError) as error:
        remedy = f"an npz file with {', '.join(ARCHIVE)}"
        raise Refused(Problem(f"no archive of a graph: {error}", "dataset.path", str(file), remedy)) from error
    nodes, width = read["x_shape"].tolist()
    rows = torch.repeat_interleave(torch.arange(nodes), read["x_indptr"].diff())
    features = torch.zeros(nodes, width)
    features[rows, read["x_indices"]] = 1.0
    parts = {"train": read["train_idx"], "validation": read["val_idx"], "test": read["test_idx"]}
    return Graph(features, read["y"], undirected(read["edges"], nodes)), parts
