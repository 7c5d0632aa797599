"""Which rows of the files make up which split: ids, the validation split, class-balanced subsets. All by hash of the id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.errors import Problem, Refused

FILE_ORDER = ("train", "test", "validation")  # ids count through the files in this order
WORLD_SEED = 0  # splits belong to the data, not to a run: the same for every run seed


@dataclass(frozen=True)
class Selection:
    """Rows of one split."""

    table: str  # the files they come from: a key of the opened tables
    rows: Tensor  # int64 [N], rising
    ids: Tensor  # int64 [N]


def select(
    targets: Mapping[str, Tensor], validation: float = 0.0, subset: int | None = None, subset_test: int | None = None
) -> dict[str, Selection]:
    """Cut the opened tables, given as their targets [N] each, into splits.

    Args:
        validation: share of the training rows that become the validation split, chosen by hash of the id.
        subset: so many of the remaining training rows, the same number of each class (within one).
        subset_test: likewise of the test rows.

    Raises:
        Refused: a subset larger than its split, or a split that this leaves empty.
    """
    found: dict[str, Selection] = {}
    first = 0
    for table in (name for name in FILE_ORDER if name in targets):
        rows = torch.arange(len(targets[table]))
        found[table] = Selection(table, rows, rows + first)
        first += len(rows)
    if validation:
        train = found["train"]
        held = rng.uniform(rng.key(WORLD_SEED, "validation"), train.ids) < validation
        found["validation"] = _keep(train, held)
        found["train"] = _keep(train, ~held)
    for split, count, key in (("train", subset, "dataset.subset"), ("test", subset_test, "dataset.subset_test")):
        if count is not None and split in found:
            chosen = found[split]
            found[split] = _keep(chosen, _balanced(targets[split][chosen.rows], chosen.ids, count, split, key))
    for split, part in found.items():
        if len(part.ids) == 0:
            raise Refused(Problem(f"the {split} split is empty", "dataset.validation", "", f"another fraction than {validation}"))
    return found


def _keep(selection: Selection, which: Tensor) -> Selection:
    return Selection(selection.table, selection.rows[which], selection.ids[which])


def _balanced(targets: Tensor, ids: Tensor, count: int, split: str, key: str) -> Tensor:
    """Positions of `count` rows in rising order: the first of every class by hash, then the second of every class, and so on.

    A smaller subset is part of a larger one; a class that runs out leaves its share to the others.
    """
    if not 1 <= count <= len(ids):
        what = f"{count} rows are asked for; the {split} split has {len(ids)}"
        raise Refused(Problem(what, key, "", f"{key}={len(ids)} at most, or null for all"))
    by_hash = torch.argsort(rng.bits(rng.key(WORLD_SEED, "subset"), ids), stable=True)
    grouped = by_hash[torch.argsort(targets[by_hash], stable=True)]  # by class, each in hash order
    sizes = torch.bincount(targets)
    rank = torch.arange(len(ids)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return grouped[torch.argsort(rank, stable=True)[:count]].sort().values
