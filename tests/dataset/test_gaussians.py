from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdrun.dataset.gaussians import BETWEEN, GaussianData


def bayes(sigma: float, seed: int) -> float:
    test = GaussianData(sigma=sigma, seed=seed, n_train=60, n_test=10_000).load().split("test")
    return 100 * float((test.extra["truth_logits"].argmax(1) == test.targets).float().mean())


@pytest.mark.parametrize(("sigma", "expected"), [(0.8, 97.3), (1.2, 86.0)])
def test_the_bayes_accuracy_is_that_of_the_worked_example(sigma: float, expected: float) -> None:
    seen = torch.tensor([bayes(sigma, seed) for seed in range(6)])
    assert abs(float(seen.mean()) - expected) < 3 * float(seen.std()) / math.sqrt(6)


def test_the_posterior_is_calibrated() -> None:
    """If it is the truth, the mean probability of the true class is the mean of the sum of squares."""
    test = GaussianData(sigma=1.2, n_test=20_000).load().split("test")
    p = test.extra["truth_logits"].double().exp()
    torch.testing.assert_close(p.sum(1), torch.ones(20_000, dtype=torch.float64), rtol=0, atol=1e-5)
    gap = p.gather(1, test.targets[:, None])[:, 0] - p.square().sum(1)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(20_000)


def test_the_posterior_agrees_with_a_direct_computation() -> None:
    data = GaussianData(classes=6, superclasses=3)
    world = data.world()
    u = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = torch.stack([torch.exp(-(u - m).square().sum(1) / (2 * 0.8**2)) for m in world.means], 1)
    torch.testing.assert_close(world.posterior(u, 0.8).exp(), density / density.sum(1, keepdim=True), rtol=1e-10, atol=0)


def test_superclasses_and_classes_have_their_spread() -> None:
    means = torch.stack([GaussianData(within=0.5, seed=s).world().means for s in range(40)]).view(40, 6, 10, 16)
    assert abs(float(means.std(1).square().mean()) - 0.25) < 0.01
    total = means.square().mean()
    assert abs(float(total) - (BETWEEN**2 + 0.25)) < 0.15


def test_only_training_labels_are_noisy() -> None:
    splits = GaussianData(noise=0.3, n_train=20_000, n_test=2000, validation=0.1).load().splits
    train = splits["train"]
    share = float(train.extra["noisy"].float().mean())
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    kept = ~train.extra["noisy"]
    assert torch.equal(train.targets[kept], train.extra["clean_targets"][kept])
    hit = float((train.targets == train.extra["clean_targets"])[train.extra["noisy"]].float().mean())
    assert abs(hit - 1 / 60) < 4 * math.sqrt(1 / 60 / 6000)  # the uniform class may be the true one
    for name in ("test", "validation"):
        assert not splits[name].extra["noisy"].any()
        assert torch.equal(splits[name].targets, splits[name].extra["clean_targets"])


def test_noise_changes_labels_and_nothing_else() -> None:
    clean, noisy = GaussianData().load(), GaussianData(noise=0.5).load()
    assert torch.equal(clean.split("train").storage.inputs, noisy.split("train").storage.inputs)  # type: ignore[attr-defined]
    assert torch.equal(clean.split("train").targets, noisy.split("train").extra["clean_targets"])


def test_training_rows_are_standardised_and_ids_are_unique() -> None:
    data = GaussianData(validation=0.1).load()
    inputs = data.split("train").storage.inputs.double()  # type: ignore[attr-defined]
    torch.testing.assert_close(inputs.mean(0), torch.zeros(32, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-6)
    assert sorted(torch.cat([s.ids for s in data.splits.values()]).tolist()) == list(range(data.total_ids))


def test_a_world_is_its_seed() -> None:
    assert GaussianData(seed=3).load().fingerprint == GaussianData(seed=3).load().fingerprint
    assert GaussianData(seed=3).load().fingerprint != GaussianData(seed=4).load().fingerprint
    same = torch.equal(GaussianData(seed=3, sigma=1.2, n_train=10).world().means, GaussianData(seed=3).world().means)
    assert same  # the classes do not move with the number or the spread of the samples


def test_rows_carry_the_truth() -> None:
    batch = GaussianData().load().rows("train", torch.tensor([5, 1]), torch.tensor([0, 0]), seed=1)
    assert batch.extra["truth_logits"].shape == (2, 60)
    assert batch.inputs.shape == (2, 32)


@pytest.mark.parametrize("kwargs", [{"superclasses": 61}, {"sigma": 0.0}, {"noise": 1.5}, {"n_train": 0}, {"validation": 1.0}])
def test_worlds_that_cannot_be_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        GaussianData(**kwargs)
