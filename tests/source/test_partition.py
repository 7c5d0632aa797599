from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun import rng
from kdrun.source.partition import by_class, contributed, dirichlet, holders, unlabelled
from tests.source.test_loader import data

CLASSES, PER_CLASS = 10, 40


def labels(unlabelled_rows: int = 0) -> tuple[Tensor, Tensor]:
    """(targets, ids) whose ids are not their positions."""
    targets = torch.arange(CLASSES * PER_CLASS) % CLASSES
    targets[:unlabelled_rows] = -1
    return targets, torch.arange(len(targets)) * 3 + 7


def strong(clients: int, per_client: int, seed: int = 0, unlabelled_rows: int = 0) -> tuple[list[Tensor], Tensor]:
    targets, ids = labels(unlabelled_rows)
    return by_class(targets, ids, holders(clients, CLASSES, per_client), clients, seed), targets


def counts(parts: list[Tensor], targets: Tensor) -> Tensor:
    """[clients, classes]"""
    return torch.stack([targets[part].bincount(minlength=CLASSES) for part in parts])


def test_strong_non_iid_gives_client_k_class_k() -> None:
    parts, targets = strong(10, 1)
    assert torch.equal(counts(parts, targets), PER_CLASS * torch.eye(10, dtype=torch.int64))


def test_weak_non_iid_gives_client_k_its_next_classes_and_cuts_each_class_evenly() -> None:
    parts, targets = strong(10, 3)
    found = counts(parts, targets)
    for client in range(10):
        assert found[client].nonzero()[:, 0].tolist() == sorted((client + i) % 10 for i in range(3))
    assert set(found[found > 0].tolist()) == {13, 14}  # 40 rows over three clients


def test_iid_cuts_every_class_evenly_among_all() -> None:
    parts, targets = strong(10, CLASSES)
    assert torch.equal(counts(parts, targets), torch.full((10, CLASSES), PER_CLASS // 10))


@pytest.mark.parametrize(("clients", "per_client"), [(10, 1), (10, 2), (20, 1), (5, 2), (3, 10), (1, 10)])
def test_every_labelled_row_has_one_client(clients: int, per_client: int) -> None:
    parts, targets = strong(clients, per_client, unlabelled_rows=4)
    assert torch.equal(torch.cat(parts).sort().values, (targets >= 0).nonzero()[:, 0])
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_fewer_clients_hold_classes_that_are_spread_out() -> None:
    assert holders(5, 10, 2) == [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,), (4,), (4,)]
    assert holders(5, 10, 1)[1] == ()  # nobody's: the plan refuses it
    assert holders(4, 2, 1) == [(0, 1), (2, 3)]


def test_a_row_goes_to_the_same_client_in_whatever_order_the_rows_come() -> None:
    targets, ids = labels()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    who = holders(10, CLASSES, 3)
    for straight, mixed in (
        (by_class(targets, ids, who, 10, 0), by_class(targets[order], ids[order], who, 10, 0)),
        (dirichlet(targets, ids, CLASSES, 10, 0.5, 0), dirichlet(targets[order], ids[order], CLASSES, 10, 0.5, 0)),
    ):
        assert [set(ids[a].tolist()) for a in straight] == [set(ids[order][b].tolist()) for b in mixed]


def test_another_seed_is_another_partition() -> None:
    assert [part.tolist() for part in strong(10, 3, seed=1)[0]] == [part.tolist() for part in strong(10, 3, seed=1)[0]]
    assert [part.tolist() for part in strong(10, 3, seed=1)[0]] != [part.tolist() for part in strong(10, 3, seed=2)[0]]


def test_dirichlet_shares_are_those_of_the_distribution() -> None:
    """Var of a share of a symmetric Dirichlet over n clients: (n - 1) / (n^2 (n a + 1))."""
    ids = torch.arange(2000)
    targets, n = torch.arange(2000) % 2, 4
    for concentration in (0.3, 5.0):
        shares = torch.stack(
            [counts(dirichlet(targets, ids, 2, n, concentration, seed), targets)[:, :2].double() / 1000 for seed in range(200)]
        )
        expected = (n - 1) / (n**2 * (n * concentration + 1))
        assert abs(float(shares.mean()) - 1 / n) < 1e-3  # every row is somebody's
        assert float(shares.var()) == pytest.approx(expected, rel=0.15)


def test_a_client_gives_its_fraction_and_at_least_one_row() -> None:
    _, ids = labels()
    own = torch.arange(0, 400, 10)
    given = contributed(own, ids, 0.2, seed=0)
    assert len(given) == 8
    assert torch.isin(given, own).all()
    assert len(contributed(own, ids, 0.001, seed=0)) == 1
    assert torch.equal(contributed(own, ids, 1.0, seed=0), own)
    assert torch.isin(given, contributed(own, ids, 0.5, seed=0)).all()  # a larger fraction adds rows
    assert given.tolist() != contributed(own, ids, 0.2, seed=1).tolist()


def test_shared_inputs_come_without_labels() -> None:
    split = data().split("train")
    bare = unlabelled(split)
    assert torch.equal(bare.targets, torch.full((50,), -1))
    assert torch.equal(bare.ids, split.ids)
    assert bare.extra == {}
    request = bare.request(torch.tensor([3, 1]), torch.zeros(2, dtype=torch.int64), rng.key(0), False)
    assert torch.equal(bare.storage.fetch(request, torch.device("cpu")), split.storage.fetch(request, torch.device("cpu")))
