from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.dataset.select import select
from kdrun.errors import Refused


def targets(train: int = 3000, test: int = 500, classes: int = 10) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    return {"train": torch.randint(classes, (train,), generator=source), "test": torch.randint(classes, (test,), generator=source)}


def test_ids_count_through_train_then_test() -> None:
    chosen = select(targets())
    assert torch.equal(chosen["train"].ids, torch.arange(3000))
    assert torch.equal(chosen["test"].ids, torch.arange(3000, 3500))
    assert "validation" not in chosen


def test_validation_rows_keep_their_training_ids() -> None:
    chosen = select(targets(), validation=0.2)
    train, held = set(chosen["train"].ids.tolist()), set(chosen["validation"].ids.tolist())
    assert not train & held
    assert train | held == set(range(3000))
    assert abs(len(held) / 3000 - 0.2) < 4 * (0.2 * 0.8 / 3000) ** 0.5
    assert chosen["validation"].table == "train"
    assert torch.equal(chosen["validation"].rows, chosen["validation"].ids)
    assert torch.equal(chosen["test"].ids, torch.arange(3000, 3500))


def test_a_row_is_held_out_whatever_the_others_are() -> None:
    full, prefix = (
        select(targets(), validation=0.2),
        select({"train": targets()["train"][:1000], "test": targets()["test"]}, validation=0.2),
    )
    assert torch.equal(prefix["validation"].ids, full["validation"].ids[full["validation"].ids < 1000])
    larger = select(targets(), validation=0.3)
    assert set(full["validation"].ids.tolist()) < set(larger["validation"].ids.tolist())


def test_subsets_are_balanced_nested_and_in_file_order() -> None:
    labels = targets()
    chosen = {n: select(labels, validation=0.1, subset=n, subset_test=50) for n in (20, 105, 500)}
    for n, parts in chosen.items():
        ids = parts["train"].ids
        counts = torch.bincount(labels["train"][ids], minlength=10)
        assert len(ids) == n
        assert counts.max() - counts.min() <= 1
        assert torch.equal(ids, ids.sort().values)
        assert torch.bincount(labels["test"][parts["test"].rows], minlength=10).tolist() == [5] * 10
        assert not set(ids.tolist()) & set(parts["validation"].ids.tolist())
    assert set(chosen[20]["train"].ids.tolist()) < set(chosen[105]["train"].ids.tolist()) < set(chosen[500]["train"].ids.tolist())


def test_a_class_that_runs_out_leaves_its_share_to_the_others() -> None:
    labels = {"train": torch.tensor([0] * 3 + [1] * 50 + [2] * 50), "test": torch.zeros(1, dtype=torch.int64)}
    assert torch.bincount(labels["train"][select(labels, subset=43)["train"].rows]).tolist() == [3, 20, 20]


def test_a_subset_of_all_rows_is_all_rows() -> None:
    assert torch.equal(select(targets(), subset=3000)["train"].ids, torch.arange(3000))


def test_a_subset_that_cannot_be_is_refused() -> None:
    with pytest.raises(Refused, match=r"dataset\.subset: 3001 rows are asked for; the train split has 3000"):
        select(targets(), subset=3001)
    with pytest.raises(Refused, match=r"dataset\.subset_test"):
        select(targets(), subset_test=501)
    with pytest.raises(Refused, match="0 rows are asked for"):
        select(targets(), subset=0)


def test_a_validation_share_that_leaves_a_split_empty_is_refused() -> None:
    few = {"train": torch.tensor([0, 1]), "test": torch.tensor([0])}
    with pytest.raises(Refused, match="split is empty"):
        select(few, validation=1e-6)
