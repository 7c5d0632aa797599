"""The world of events: its truth, its noise, and who knows it."""

from __future__ import annotations

import pytest
import torch

from kdrun.config.compose import compose
from kdrun.dataset.base import Data
from kdrun.dataset.events import HEAD, EventData
from kdrun.dataset.tokens import prompts_of
from kdrun.types import Batch


def rows_of(data: Data, split: str = "train") -> Batch:
    return next(data.batches(split, 10**6))


def accepted(data: Data, split: str = "train") -> float:
    batch = rows_of(data, split)
    assert data.oracle is not None
    return sum(data.oracle(p.tolist(), [int(y[-1])]) for p, y in zip(batch.inputs, batch.targets, strict=True)) / len(batch.ids)


@pytest.fixture(scope="module")
def web() -> Data:
    return EventData(seed=1).load()


def test_sizes_are_those_of_the_definition(web: Data) -> None:
    assert {name: len(split) for name, split in web.splits.items()} == {"train": 36000, "test": 900}
    assert web.classes == 125
    assert web.vocabulary is not None
    assert web.vocabulary.decode([0, 30, 60, 65]) == "verb0 object0 relation0 tail0"
    assert len(EventData(graph="human", seed=1).load().split("train")) == 70 * 5 * 3
    assert web.total_ids == 36900


def test_classes_are_balanced_and_valid_tails_distinct() -> None:
    world = EventData(seed=3).world()
    assert torch.bincount(world.verb_class).tolist() == torch.bincount(world.object_class).tolist() == [5] * 6
    assert world.valid.shape == (5, 6, 6, 3)
    assert all(len(set(cell.tolist())) == 3 for cell in world.valid.view(-1, 3))
    assert set(world.valid.flatten().tolist()) == set(range(60))  # cells share tails


def test_a_row_is_three_tokens_and_a_tail_that_is_learned(web: Data) -> None:
    batch = rows_of(web)
    assert batch.inputs.shape == batch.targets.shape == (36000, 3)
    assert bool((batch.targets[:, :2] == -1).all())
    for column, (low, high) in zip((*batch.inputs.T, batch.targets[:, 2]), ((0, 30), (30, 60), (60, 65), (65, 125)), strict=True):
        assert (int(column.min()), int(column.max())) == (low, high - 1)
    prompts, references = prompts_of(torch.stack([batch.inputs, batch.targets], 1)[:5])
    assert [len(p) for p in prompts] == [3] * 5
    assert [len(r) for r in references] == [1] * 5


def test_the_oracle_accepts_the_valid_tails_and_nothing_else(web: Data) -> None:
    world, oracle = EventData(seed=1).world(), web.oracle
    assert oracle is not None
    for verb, thing, relation in ((0, 0, 0), (7, 29, 4), (29, 3, 2)):
        valid = world.valid[relation, world.verb_class[verb], world.object_class[thing]].tolist()
        prompt = [verb, 30 + thing, 60 + relation]
        assert [t for t in range(60) if oracle(prompt, [65 + t])] == sorted(valid)
        assert oracle(prompt, []) == oracle(prompt, [65 + valid[0], 65 + valid[1]]) == oracle(prompt[:2], [65 + valid[0]]) == 0


def test_noise_is_another_pair_s_truth_and_may_be_right_by_chance(web: Data) -> None:
    """.72 + .28 times the chance that a tail of another cell is valid here, three in sixty on average: to four standard errors."""
    world, size = EventData(seed=1).world(), 36000
    flat = world.valid.view(5, 36, 3)
    shared = torch.tensor([[len({*a.tolist()} & {*b.tolist()}) for b in rows] for rows in flat for a in rows]).view(5, 36, 36).double()
    chance = float((shared.sum((0, 1, 2)) - 3 * 180) / (5 * 36 * 35) / 3)
    expected = 0.72 + 0.28 * chance
    assert accepted(web) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / size) ** 0.5 + 0.005)  # chance differs by event
    assert accepted(web, "test") == 1
    assert accepted(EventData(noise=0, seed=1).load()) == 1
    human = accepted(EventData(graph="human", seed=1).load())
    assert human == pytest.approx(0.875, abs=4 * (0.875 * 0.125 / 1050) ** 0.5)


def test_no_event_is_on_two_sides(web: Data) -> None:
    train, test = (set(web.split(part).extra[HEAD].tolist()) for part in ("train", "test"))
    assert (len(train), len(test)) == (720, 180)
    assert not train & test
    human = set(EventData(graph="human", seed=1).load().split("train").extra[HEAD].tolist())
    assert len(human) == 70
    assert human < train


def test_both_graphs_and_all_sizes_are_of_one_world() -> None:
    small, human, other = EventData(per_cell=2, seed=1), EventData(graph="human", seed=1), EventData(seed=2)
    assert torch.equal(small.world().valid, human.world().valid)
    assert not torch.equal(small.world().valid, other.world().valid)
    few, many = rows_of(small.load()), rows_of(EventData(per_cell=3, seed=1).load())
    assert torch.equal(few.targets.view(-1, 2, 3), many.targets.view(-1, 3, 3)[:, :2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"web_events": 900}, "web_events=900"), ({"human_events": 721}, "human_events=721"), ({"noise": 1.5}, "noise=1.5"),
        ({"valid": 61}, "tails=60"), ({"verbs": 5}, "verbs=5"), ({"graph": "books"}, "graph='books'"), ({"groups": 1}, "groups=1"),
        ({"per_cell": 0}, "per_cell=0"),
    ],
)  # fmt: skip
def test_worlds_that_cannot_be_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EventData(**change)  # type: ignore[arg-type]


def test_the_option_states_every_setting_with_its_default() -> None:
    node = compose(["dataset=events"]).tree["dataset"]
    assert {k: v for k, v in node.items() if k != "_target_"} == vars(EventData())
