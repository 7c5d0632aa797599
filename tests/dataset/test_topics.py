"""Topic texts: rows that follow the distribution that the data set says is true."""

from __future__ import annotations

import pytest
import torch

from kdrun.dataset.topics import CURVED, OWN, PROMPT, TopicData
from kdrun.types import Batch


def rows_of(data: TopicData, split: str = "train") -> Batch:
    return next(data.load().batches(split, 10**6))


@pytest.fixture(scope="module")
def drawn() -> Batch:
    return rows_of(TopicData())


def test_a_row_is_a_topic_two_tokens_and_twelve_scored_ones(drawn: Batch) -> None:
    assert drawn.inputs.shape == drawn.targets.shape == (6000, 14)
    assert drawn.extra["truth_logits"].shape == (6000, 14, 40)
    assert set(drawn.inputs[:, 0].tolist()) == set(range(40, 80))
    assert drawn.inputs[:, 1:].max() < 40
    assert ((drawn.targets >= 0).sum(0) == torch.tensor([0, 0] + [6000] * 12)).all()
    assert torch.equal(drawn.targets[:, 2:-1], drawn.inputs[:, 3:])


def test_the_truth_is_the_world_s_row_of_topic_and_last_two_tokens(drawn: Batch) -> None:
    world, x = TopicData().logits(), drawn.inputs
    for i in (2, 7, 13):
        assert torch.equal(drawn.extra["truth_logits"][:, i], world[x[:, 0] - 40, x[:, i - 1], x[:, i]])


def test_entropy_is_that_of_the_definition(drawn: Batch) -> None:
    """1.82 nats on the test rows of the world of seed 0; other worlds and rows differ in the second digit."""
    for rows, tolerance in ((rows_of(TopicData(n_train=1), "test"), 0.005), (drawn, 0.02)):
        log_p = rows.extra["truth_logits"][:, PROMPT - 1 :].log_softmax(-1)
        assert -(log_p.exp() * log_p).sum(-1).mean().item() == pytest.approx(1.82, abs=tolerance)
    worlds = [TopicData(seed=seed).logits().log_softmax(-1) for seed in range(1, 4)]
    assert all(-(w.exp() * w).sum(-1).mean().item() == pytest.approx(1.82, abs=0.1) for w in worlds)


def test_logits_spread_as_the_definition_says() -> None:
    """Var z = 1.8^2 E tanh^2(1.5 n) 64 (2/8)^2 + 0.5^2 for normal n: every hidden unit hears a normal number of standard deviation 1.5."""
    n = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = (-(n**2) / 2).exp() / (-(n**2) / 2).exp().sum()
    expected = CURVED**2 * (density * torch.tanh(1.5 * n) ** 2).sum() * 64 * (2 / 8) ** 2 + OWN**2
    for seed in range(3):
        assert TopicData(seed=seed).logits().var().item() == pytest.approx(expected.item(), rel=0.08)


def test_samples_follow_the_truth(drawn: Batch) -> None:
    """The mean of -log p of what came is the entropy to four standard errors, and no token comes too often: chi-square of 40 counts."""
    y, log_p = drawn.targets[:, PROMPT - 1 :], drawn.extra["truth_logits"][:, PROMPT - 1 :].double().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    variance = (p * log_p**2).sum(-1) - entropy**2
    surprise = -log_p.gather(-1, y[..., None])[..., 0]
    assert abs((surprise - entropy).sum().item()) < 4 * variance.sum().sqrt().item()
    counts = torch.bincount(y.flatten(), minlength=40)
    z = (counts - p.sum((0, 1))) / (p * (1 - p)).sum((0, 1)).sqrt()
    assert (z**2).sum().item() < 40 + 4 * 80**0.5
    assert (z**2).sum().item() > 40 - 4 * 80**0.5  # nor too well


def test_prompts_are_uniform(drawn: Batch) -> None:
    for column in drawn.inputs[:, :PROMPT].T:
        counts = torch.bincount(column % 40, minlength=40).double()
        assert ((counts - 150) ** 2 / 150).sum().item() < 39 + 4 * 78**0.5


def test_rows_are_the_same_however_many_are_drawn() -> None:
    few, many = rows_of(TopicData(n_train=30, n_test=5)), rows_of(TopicData(n_train=50, n_test=9, n_validation=3))
    assert torch.equal(few.inputs, many.inputs[:30])
    assert torch.equal(few.extra["truth_logits"], many.extra["truth_logits"][:30])


def test_splits_have_rows_and_ids_of_their_own() -> None:
    data = TopicData(n_train=20, n_test=20, n_validation=20).load()
    ids = torch.cat([split.ids for split in data.splits.values()])
    assert sorted(ids.tolist()) == list(range(60))
    assert data.total_ids == 60
    inputs = [next(data.batches(name, 20)).inputs for name in data.splits]
    assert not any(torch.equal(inputs[i], inputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_another_seed_is_another_world() -> None:
    one, other, again = (TopicData(n_train=20, n_test=5, seed=seed) for seed in (0, 1, 0))
    assert not torch.equal(one.logits(), other.logits())
    assert torch.equal(one.logits(), again.logits())
    assert one.load().fingerprint == again.load().fingerprint != other.load().fingerprint


def test_its_vocabulary_tells_topics_from_tokens() -> None:
    data = TopicData(topics=3, tokens=4, n_train=2, n_test=2).load()
    assert data.vocabulary is not None
    assert (data.classes, data.vocabulary.size) == (4, 7)
    assert data.vocabulary.decode([6, 0, 3]) == "topic2 w0 w3"


@pytest.mark.parametrize(
    ("key", "value"), [("topics", 0), ("tokens", 1), ("length", 0), ("n_train", 0), ("n_test", 0), ("n_validation", -1)]
)
def test_sizes_that_make_no_world_are_refused(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}={value} must be at least"):
        TopicData(**{key: value})
