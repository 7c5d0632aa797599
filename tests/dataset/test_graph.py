from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdrun.dataset.base import Data, fingerprint
from kdrun.dataset.csbm import CSBMData
from kdrun.dataset.graph import Graph, graph_data, induced, random_parts, undirected
from kdrun.dataset.graph_files import PITFALLS, PLANETOID, PitfallsData, PlanetoidData
from kdrun.errors import Refused
from tests.dataset.graphs import WIDTH, drawn, write_archive, write_pitfalls, write_raw_planetoid


def edges_of(data: Data, split: str = "train") -> Tensor:
    return data.split(split).constants["edge_index"]


def own(data: Data, split: str) -> Tensor:
    """The ids of a split's own nodes."""
    part = data.split(split)
    return part.ids[part.targets >= 0]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDRUN_DATA", raising=False)


# -- the world -----------------------------------------------------------------------------------------------------


def test_the_world_has_the_sizes_it_states() -> None:
    data = CSBMData().load()
    edges = edges_of(data)
    assert edges.shape == (2, 5000)  # 2500 undirected ones: a mean degree of 5
    assert (edges[0] != edges[1]).all()
    assert len(torch.unique(edges, dim=1).T) == 5000
    assert {split: len(own(data, split)) for split in data.splits} == {"train": 120, "validation": 300, "test": 580}
    labels = torch.arange(1000) % 6
    assert torch.bincount(labels[own(data, "train")]).tolist() == [20] * 6
    assert data.input_shape == (48,)
    assert data.whole


def test_edges_prefer_their_class_and_features_lie_around_their_class() -> None:
    inside, spread, norms = [], [], []
    labels = torch.arange(1000) % 6
    for seed in range(20):
        data = CSBMData(seed=seed).load()
        edges = edges_of(data)
        inside.append(float((labels[edges[0]] == labels[edges[1]]).float().mean()))
        x = data.split("train").storage.inputs.double()  # type: ignore[attr-defined]
        means = torch.stack([x[labels == c].mean(0) for c in range(6)])
        spread.append(float((x - means[labels]).square().mean()) * 1000 / 994)
        norms.append(float((means.square().sum(1) - 48 * 6 / 1000).mean()))
    assert abs(float(np.mean(inside)) - 0.645) < 4 * 0.0095 / 20**0.5  # 0.65, less the duplicates that were dropped
    assert abs(float(np.mean(spread)) - 1) < 4 * (2 / (20 * 48 * 994)) ** 0.5
    assert abs(float(np.mean(norms)) - (0.6 * 48**0.5 / 2) ** 2) < 0.1


def test_partners_are_uniform_inside_and_outside_the_class() -> None:
    world = CSBMData(nodes=9, classes=3, edges=4, homophily=0.5, labelled=1, validation=2)
    labels, seen = torch.arange(9) % 3, torch.zeros(9, 9)
    for seed in range(3000):
        world.seed = seed
        first, second = world._pairs(labels)[:, 0].tolist()  # the first pair, before any duplicate was dropped
        seen[first, second] += 1
        seen[second, first] += 1
    same = labels[:, None] == labels
    expected = torch.where(same, 0.5 / 9, 0.5 / 27) * 3000 * (1 - torch.eye(9))
    assert ((seen - expected).abs() < 4.5 * expected.sqrt() + 1e-9).all()


def test_a_world_is_its_seed() -> None:
    assert CSBMData(seed=3).load().fingerprint == CSBMData(seed=3).load().fingerprint
    assert CSBMData(seed=3).load().fingerprint != CSBMData(seed=4).load().fingerprint


def test_edges_and_order_of_the_nodes_are_part_of_the_fingerprint() -> None:
    labels, features, pairs = drawn(40, 4)
    graph = Graph(torch.tensor(features.todense()), torch.tensor(labels), undirected(torch.tensor(pairs), 40))
    parts = random_parts(graph.labels, 3, 8, None, key=1)

    def printed(g: Graph, p: dict[str, Tensor]) -> str:
        return graph_data("g", g, p, "transductive", 0.2, 0).fingerprint

    order = torch.arange(40).roll(1)
    moved = Graph(graph.features[order], graph.labels[order], undirected(order.argsort()[graph.edges], 40))
    assert printed(graph, parts) == printed(graph, dict(parts))
    assert printed(graph._replace(edges=graph.edges[:, :-2]), parts) != printed(graph, parts)
    assert printed(moved, {k: order.argsort()[v] for k, v in parts.items()}) != printed(graph, parts)


@pytest.mark.parametrize(
    "kwargs", [{"classes": 1}, {"homophily": 1.0}, {"edges": 0}, {"edges": 10**6}, {"held_out": 0.0}, {"setting": "both"}, {"labelled": 0}]
)
def test_worlds_that_cannot_be_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        CSBMData(**kwargs)


def test_too_few_nodes_for_the_parts_are_refused() -> None:
    with pytest.raises(Refused, match=r"dataset\.labelled"):
        CSBMData(labelled=200).load()
    with pytest.raises(Refused, match=r"dataset\.validation"):
        CSBMData(validation=900).load()


# -- what is seen --------------------------------------------------------------------------------------------------


def test_transductive_splits_share_one_graph_and_hide_labels() -> None:
    data = CSBMData().load()
    parts = list(data.splits.values())
    assert len({id(part.storage) for part in parts}) == 1
    assert all(torch.equal(part.ids, torch.arange(1000)) for part in parts)
    assert sorted(torch.cat([own(data, split) for split in data.splits]).tolist()) == list(range(1000))
    labels = data.labels_by_id("train")
    assert (labels >= 0).sum() == 120


def test_inductive_training_never_sees_the_held_out_nodes() -> None:
    data = CSBMData(setting="inductive").load()
    hidden = own(data, "test")
    assert len(hidden) == 116  # 20 % of 580
    for split in ("train", "validation"):
        part = data.split(split)
        assert not torch.isin(hidden, part.ids).any()
        assert len(part) == len(part.storage) == 884
        assert int(edges_of(data, split).max()) < 884
    assert len(data.split("test")) == 1000
    assert edges_of(data, "test").shape == (2, 5000)
    full = CSBMData().load()
    kept, edges = data.split("train").ids, edges_of(full)
    there = edges[:, torch.isin(edges, kept).all(0)]
    assert torch.equal(kept[edges_of(data)], there)  # every edge between two seen nodes, and no other
    x = data.split("train").storage.inputs  # type: ignore[attr-defined]
    assert torch.equal(x, full.split("train").storage.inputs[kept])  # type: ignore[attr-defined]
    assert torch.equal(own(data, "train"), own(full, "train"))
    assert torch.isin(hidden, own(full, "test")).all()


def test_the_draw_of_the_held_out_nodes_is_the_seed() -> None:
    drawn_by = [own(CSBMData(setting="inductive", seed=seed).load(), "test").tolist() for seed in (0, 0, 1)]
    assert drawn_by[0] == drawn_by[1] != drawn_by[2]


def test_an_induced_graph_is_renumbered() -> None:
    graph = Graph(torch.eye(4), torch.arange(4), undirected(torch.tensor([[0, 1, 2], [1, 3, 3]]), 4))
    part = induced(graph, torch.tensor([1, 2, 3]))
    assert part.edges.tolist() == [[0, 1, 2, 2], [2, 2, 0, 1]]
    assert part.labels.tolist() == [1, 2, 3]
    assert torch.equal(part.features, torch.eye(4)[1:])


def test_undirected_edges_stand_once_in_each_direction() -> None:
    pairs = torch.tensor([[0, 1, 2, 2, 0], [1, 0, 2, 3, 1]])
    assert undirected(pairs, 4).tolist() == [[0, 1, 2, 3], [1, 0, 3, 2]]


# -- files ---------------------------------------------------------------------------------------------------------


def test_archive_and_raw_files_hold_the_same_graph(tmp_path: Path) -> None:
    archive = PlanetoidData(path=str(write_archive(tmp_path / "a"))).load()
    raw = PlanetoidData(path=str(write_raw_planetoid(tmp_path / "b"))).load()
    assert archive.fingerprint == raw.fingerprint
    assert archive.classes == 7
    assert {split: len(own(raw, split)) for split in raw.splits} == {"train": 140, "validation": 500, "test": 40}
    labels, features, pairs = drawn(680, 7)
    x = features.toarray()
    expected = x / np.maximum(x.sum(1, keepdims=True), 1e-12)
    np.testing.assert_allclose(raw.split("train").storage.inputs, expected, rtol=1e-6)  # type: ignore[attr-defined]
    assert torch.equal(raw.labels_by_id("test")[-40:], torch.tensor(labels[-40:]))
    assert torch.equal(edges_of(raw), undirected(torch.tensor(pairs), 680))


def test_files_are_found_where_torch_geometric_keeps_them(tmp_path: Path) -> None:
    write_raw_planetoid(tmp_path / "PubMed" / "raw", "pubmed")
    assert PlanetoidData("pubmed", path=str(tmp_path)).load().classes == 3


def test_files_are_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "planetoid", "citeseer")
    write_pitfalls(tmp_path / "gnn_benchmark", "amazon_photo")
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    assert PlanetoidData("citeseer").load().classes == 6
    assert PitfallsData("amazon_photo").load().classes == 8


@pytest.mark.parametrize("name", PITFALLS)
def test_random_splits_have_their_sizes_and_are_drawn_by_the_seed(tmp_path: Path, name: str) -> None:
    path = str(write_pitfalls(tmp_path, name))
    data, again, other = (PitfallsData(name, path=path, seed=seed).load() for seed in (1, 1, 2))
    classes = PITFALLS[name].classes
    assert {split: len(own(data, split)) for split in data.splits} == {"train": 20 * classes, "validation": 500, "test": 1000}
    assert torch.bincount(data.labels_by_id("train")[own(data, "train")]).tolist() == [20] * classes
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(edges_of(data), edges_of(other))
    assert data.split("train").storage.inputs.unique().tolist() == [0, 1]  # type: ignore[attr-defined]
    assert (edges_of(data)[0] != edges_of(data)[1]).all()
    assert data.input_shape == (WIDTH,)


@pytest.mark.parametrize(("cls", "name"), [*((PlanetoidData, n) for n in PLANETOID), *((PitfallsData, n) for n in PITFALLS)])
def test_an_absent_graph_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any, name: str) -> None:
    for path in (None, str(tmp_path)):
        with pytest.raises(Refused) as refused:
            cls(name, path=path).load()
        (problem,) = refused.value.problems
        assert problem.key == "dataset.path"
        assert ("KDRUN_DATA" if path is None else path) in problem.where
        assert all(word in problem.remedy for word in ("github.com/", "dataset.path=FOLDER", "dataset.download=true"))
        assert ({**PLANETOID, **PITFALLS}[name].file.removesuffix(".x")) in problem.remedy
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    with pytest.raises(Refused, match=cls.home):
        cls(name).load()


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cora.npz").write_bytes(b"no archive")
    with pytest.raises(Refused, match=r"cora\.npz"):
        PlanetoidData(path=str(tmp_path)).load()
    np.savez(tmp_path / "cora.npz", y=np.zeros(3))
    with pytest.raises(Refused, match="it has no x_indptr"):
        PlanetoidData(path=str(tmp_path)).load()
    (tmp_path / "ms_academic_cs.npz").write_bytes(b"no archive")
    with pytest.raises(Refused, match="fetch the file again"):
        PitfallsData(path=str(tmp_path)).load()


def test_what_cannot_be_fetched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(self: object, *args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("KDRUN_CACHE", str(tmp_path))
    datasets = pytest.importorskip("torch_geometric.datasets")
    for dataset, made in (("Planetoid", PlanetoidData(download=True)), ("Coauthor", PitfallsData(download=True))):
        monkeypatch.setattr(getattr(datasets, dataset), "download", no_network)
        with pytest.raises(Refused, match="no route to host"):
            made.load()


def test_the_public_split_is_not_moved() -> None:
    with pytest.raises(ValueError, match="validation=300: the public split has 500"):
        PlanetoidData(validation=300)
    with pytest.raises(ValueError, match="legal values cora, citeseer, pubmed"):
        PlanetoidData("corra")


@pytest.mark.parametrize("name", ["cora", "amazon_photo"])
def test_an_outline_has_the_published_sizes(name: str) -> None:
    stated = {**PLANETOID, **PITFALLS}[name]
    data = (PlanetoidData if name in PLANETOID else PitfallsData)(name).outline()
    assert (len(data.split("train")), data.input_shape, data.classes) == (stated.nodes, (stated.features,), stated.classes)
    assert edges_of(data).shape == (2, stated.edges)
    assert len(own(data, "train")) == 20 * stated.classes


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "labelled"), [("cora", 140), ("citeseer", 120)])
def test_the_real_graphs_have_the_published_sizes(name: str, labelled: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("real_data")
    data, stated = PlanetoidData(name, path=str(folder / "planetoid")).load(), PLANETOID[name]
    assert (len(data.split("train")), data.input_shape, data.classes) == (stated.nodes, (stated.features,), stated.classes)
    assert edges_of(data).shape == (2, stated.edges)
    assert {split: len(own(data, split)) for split in data.splits} == {"train": labelled, "validation": 500, "test": 1000}
    assert fingerprint(data.splits) == data.fingerprint


REAL = os.environ.get("KDRUN_DATA")


@pytest.fixture
def real_data() -> Path:
    if not REAL or not (Path(REAL) / "planetoid").is_dir():
        pytest.skip("KDRUN_DATA names no folder with planetoid")
    return Path(REAL)
