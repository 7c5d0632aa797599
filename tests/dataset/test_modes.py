from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdrun.dataset.modes import ModesData


def test_class_k_owns_two_opposite_modes() -> None:
    split = ModesData().load().split("train")
    centres, classes = split.constants["mode_centres"].double(), split.constants["mode_classes"]
    assert classes.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(8, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(centres[4:], -centres[:4], rtol=0, atol=1e-6)
    expected = [[math.cos(2 * math.pi * j / 8), math.sin(2 * math.pi * j / 8)] for j in range(8)]
    torch.testing.assert_close(centres, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_samples_lie_around_the_modes_of_their_class() -> None:
    batch = next(ModesData(n_test=40_000).load().batches("test", 40_000))
    centres, classes = batch.extra["mode_centres"], batch.extra["mode_classes"]
    nearest = torch.cdist(batch.inputs, centres).argmin(1)
    assert float((classes[nearest] == batch.targets).double().mean()) > 0.99
    offsets = (batch.inputs - centres[nearest])[classes[nearest] == batch.targets]
    assert offsets.mean(0).abs().max() < 4 * 0.12 / 200
    assert abs(float(offsets.std()) - 0.12) < 0.002
    for c in range(4):
        mine = nearest[batch.targets == c]
        assert abs(float((mine == c).double().mean()) - 0.5) < 0.01  # both modes, equally often


def test_every_class_has_as_many_rows() -> None:
    data = ModesData(n_train=400, n_test=80, validation=0.1).load()
    for name, rows in (("train", 400), ("test", 80), ("validation", 40)):
        assert data.split(name).targets.bincount().tolist() == [rows // 4] * 4
    assert sorted(torch.cat([s.ids for s in data.splits.values()]).tolist()) == list(range(data.total_ids))
    assert (data.input_shape, data.classes) == ((2,), 4)


def test_a_world_is_its_seed_and_splits_differ() -> None:
    one, same, other = (ModesData(n_train=64, n_test=64, seed=s).load() for s in (3, 3, 4))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    train, test = (one.split(n).storage.inputs for n in ("train", "test"))  # type: ignore[attr-defined]
    assert not torch.equal(train, test)


@pytest.mark.parametrize("kwargs", [{"modes": 6}, {"std": 0.0}, {"n_test": 0}, {"classes": 0}, {"validation": 1.0}])
def test_worlds_that_cannot_be_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        ModesData(**kwargs)
