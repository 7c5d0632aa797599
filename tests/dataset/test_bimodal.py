from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdrun.dataset.bimodal import BimodalData


def test_modes_and_samples_have_their_spread() -> None:
    means = torch.stack([BimodalData(seed=seed).means() for seed in range(40)])
    assert means.shape == (40, 10, 2, 16)
    assert abs(float(means.std()) - 2.6 * 1.6 / 4) < 4 * 1.04 / math.sqrt(2 * means.numel())
    world = BimodalData(classes=1, modes=1, train_per_class=5000)
    rows = world.load().split("train").storage.inputs.double() - world.means()[0]  # type: ignore[attr-defined]
    assert abs(float(rows.std()) - 0.7) < 4 * 0.7 / math.sqrt(2 * rows.numel())
    assert float(rows.mean(0).abs().max()) < 5 * 0.7 / math.sqrt(5000)


def test_every_class_has_the_same_number_of_rows_and_uses_both_modes() -> None:
    world = BimodalData()
    data = world.load()
    assert torch.equal(data.split("train").targets.bincount(), torch.full((10,), 400))
    assert torch.equal(data.split("test").targets.bincount(), torch.full((10,), 200))
    train = data.split("train")
    near = torch.cdist(train.storage.inputs.double(), world.means().flatten(0, 1)).view(-1, 10, 2)  # type: ignore[attr-defined]
    mode = near[torch.arange(4000), train.targets].argmin(1)
    share = torch.stack([mode[train.targets == c].double().mean() for c in range(10)])
    assert float((share - 0.5).abs().max()) < 4 * 0.5 / math.sqrt(400)


def test_the_posterior_agrees_with_a_direct_computation() -> None:
    world = BimodalData(classes=3, modes=2, dimension=4)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = torch.stack([sum(torch.exp(-(x - m).square().sum(1) / (2 * 0.7**2)) for m in of) for of in world.means()], 1)
    torch.testing.assert_close(world.posterior(x).exp(), density / density.sum(1, keepdim=True), rtol=1e-10, atol=0)


def test_the_posterior_is_calibrated() -> None:
    """If it is the truth, the mean probability of the true class is the mean of the sum of squares."""
    test = BimodalData(test_per_class=2000).load().split("test")
    p = test.extra["truth_logits"].double().exp()
    gap = p.gather(1, test.targets[:, None])[:, 0] - p.square().sum(1)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(20_000)


def test_a_world_is_its_seed_and_its_size_moves_no_mode() -> None:
    assert BimodalData(seed=3).load().fingerprint == BimodalData(seed=3).load().fingerprint
    assert BimodalData(seed=3).load().fingerprint != BimodalData(seed=4).load().fingerprint
    assert torch.equal(BimodalData(seed=3, train_per_class=7).means(), BimodalData(seed=3).means())


def test_ids_are_unique_and_validation_rows_are_further_ones() -> None:
    data, plain = BimodalData(validation=0.1).load(), BimodalData().load()
    assert sorted(torch.cat([s.ids for s in data.splits.values()]).tolist()) == list(range(data.total_ids))
    assert len(data.split("validation")) == 400
    assert torch.equal(data.split("train").storage.inputs, plain.split("train").storage.inputs)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kwargs", [{"classes": 0}, {"sigma": 0.0}, {"spread": -1.0}, {"modes": 0}, {"validation": 1.0}])
def test_worlds_that_cannot_be_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        BimodalData(**kwargs)
