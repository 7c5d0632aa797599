"""Small graphs on disk, in the layouts of the real ones: 3 or more classes, enough nodes for the published splits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

WIDTH = 12
PLANETOID_CLASSES = {"cora": 7, "citeseer": 6, "pubmed": 3}
PITFALLS_FILES = {
    "coauthor_cs": ("ms_academic_cs.npz", 15),
    "coauthor_physics": ("ms_academic_phy.npz", 5),
    "amazon_photo": ("amazon_electronics_photo.npz", 8),
}


def drawn(nodes: int, classes: int) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    """(labels [N], 0/1 features [N, WIDTH], pairs [2, M] with a < b, each once)."""
    generator = np.random.default_rng(0)
    features = sp.csr_matrix((generator.random((nodes, WIDTH)) < 0.3).astype(np.float32))
    pairs = np.unique(np.sort(generator.integers(nodes, size=(2, 3 * nodes)), axis=0), axis=1)
    return np.arange(nodes) % classes, features, pairs[:, pairs[0] != pairs[1]]


def write_archive(folder: Path, name: str = "cora", test: int = 40) -> Path:
    """<name>.npz: labels for 20 nodes of each class, 500 validation nodes, `test` test nodes."""
    classes = PLANETOID_CLASSES[name]
    labels, features, pairs = drawn(20 * classes + 500 + test, classes)
    train, validation, rest = np.split(np.arange(len(labels)), [20 * classes, 20 * classes + 500])
    folder.mkdir(parents=True, exist_ok=True)
    shape = np.array(features.shape)
    held = {"x_indptr": features.indptr, "x_indices": features.indices, "x_shape": shape, "edges": pairs, "y": labels}
    np.savez(folder / f"{name}.npz", **held, train_idx=train, val_idx=validation, test_idx=rest)
    return folder


def write_raw_planetoid(folder: Path, name: str = "cora", test: int = 40) -> Path:
    """The eight files ind.<name>.*: the first rows are those of the archive's parts."""
    classes = PLANETOID_CLASSES[name]
    labels, features, pairs = drawn(20 * classes + 500 + test, classes)
    first, rest = 20 * classes, len(labels) - test
    one_hot = np.eye(classes)[labels]
    graph: dict[int, list[int]] = {i: [] for i in range(len(labels))}
    for a, b in pairs.T.tolist():
        graph[a].append(b)
        graph[b].append(a)
    shuffled = np.random.default_rng(1).permutation(test)
    parts: dict[str, Any] = {"x": features[:first], "allx": features[:rest], "tx": features[rest:][shuffled], "graph": graph}
    parts |= {"y": one_hot[:first], "ally": one_hot[:rest], "ty": one_hot[rest:][shuffled]}
    folder.mkdir(parents=True, exist_ok=True)
    for key, part in parts.items():
        (folder / f"ind.{name}.{key}").write_bytes(pickle.dumps(part))
    (folder / f"ind.{name}.test.index").write_text("\n".join(map(str, (rest + shuffled).tolist())) + "\n")
    return folder


def write_pitfalls(folder: Path, name: str, test: int = 1000) -> Path:
    """The file of a Coauthor or Amazon graph, each edge in one direction and a self loop among them."""
    file, classes = PITFALLS_FILES[name]
    labels, features, pairs = drawn(20 * classes + 500 + test, classes)
    rows, columns = np.append(pairs[0], 0), np.append(pairs[1], 0)
    adjacency = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(labels), len(labels)))
    folder.mkdir(parents=True, exist_ok=True)
    held = {"adj": adjacency, "attr": 2.5 * features}
    arrays = {f"{key}_{part}": getattr(m, part) for key, m in held.items() for part in ("data", "indices", "indptr", "shape")}
    np.savez(folder / file, **arrays, labels=labels)
    return folder
