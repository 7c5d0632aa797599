from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from kdrun.dataset.base import Data, taken
from kdrun.errors import Refused, RunFailed
from kdrun.objective.edgefd import COVERED, TARGETS
from kdrun.source.federated import ClientStream, Federated
from kdrun.source.loader import Loader
from kdrun.source.partition import unlabelled
from tests.source.test_loader import assert_same, data, joined

SPEC = Federated(batch_size=8, proxy_batch_size=6, local_steps=2, distill_steps=3)
SHARED = torch.arange(30, 50)  # positions of the proxy rows; ids are 2 * position + 1


def client() -> Data:
    """20 private and 20 shared images of five classes."""
    whole = data()
    private = taken(whole.split("train"), torch.arange(20))
    private = replace(private, extra={COVERED: torch.zeros(20, dtype=torch.bool)})
    return replace(whole, splits={"train": private, "proxy": unlabelled(taken(whole.split("train"), SHARED))})


def spoken(rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) of the first proxy rows."""
    ids = 2 * SHARED[:rows] + 1
    return ids, torch.rand(rows, 5, generator=torch.Generator().manual_seed(seed)).softmax(1)


def stream(spec: Federated = SPEC, number: int = 1, rows: int = 12, **kwargs: Any) -> ClientStream:
    found = spec.open(client(), seed=1, **kwargs)
    found.receive(number, *spoken(rows))
    return found


def test_a_round_is_local_steps_on_private_rows_then_steps_on_shared_ones() -> None:
    found = stream()
    assert found.steps_per_epoch == 5
    kinds = [[TARGETS in batch.extra for batch in found.group(step)] for step in range(5)]
    assert kinds == [[False], [False], [True], [True], [True]]
    local = torch.cat([b.ids for step in (0, 1) for b in found.group(step)])
    assert (local < 40).all()
    shared = torch.cat([b.ids for step in (2, 3, 4) for b in found.group(step)])
    assert (shared > 60).all()
    assert not found.group(0)[0].extra[COVERED].any()
    assert found.group(2)[0].extra[COVERED].all()
    assert torch.equal(found.group(2)[0].targets, torch.full((6,), -1))


def test_private_rows_are_walked_through_as_if_there_were_no_other_steps() -> None:
    found, plain = stream(), Loader(8).open(client(), seed=1)
    for number in range(3):
        for at in range(2):
            assert_same(joined(found.group(5 * number + at)), joined(plain.group(2 * number + at)))


def test_what_was_said_lies_beside_its_sample_by_id() -> None:
    ids, targets = spoken()
    said = dict(zip(ids.tolist(), targets, strict=True))
    for step in (2, 3, 4):
        batch = stream().group(step)[0]
        assert len(batch.ids.unique()) == 6
        for row, sample in enumerate(batch.ids.tolist()):
            assert torch.equal(batch.extra[TARGETS][row], said[sample])


def test_nobody_s_samples_are_never_drawn() -> None:
    found = stream(rows=4)
    seen = torch.cat([found.group(step)[0].ids for step in (2, 3, 4)])
    assert set(seen.tolist()) == set(spoken(4)[0].tolist())
    assert len(found.group(2)[0].ids) == 4


def test_shared_rows_are_seen_as_they_were_when_they_were_spoken_of() -> None:
    batch = stream().group(3)[0]
    positions = (batch.ids - 1) // 2
    plain = data().rows("train", positions, torch.zeros_like(positions), 0, augment=False)
    assert torch.equal(batch.inputs, plain.inputs)


def test_where_nothing_is_said_a_step_has_no_rows() -> None:
    found = SPEC.open(client(), seed=1)
    found.receive(1, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5))
    (batch,) = found.group(2)
    assert batch.inputs.shape == (0, 3, 6, 6)
    assert batch.extra[TARGETS].shape == (0, 5)
    assert batch.extra[COVERED].dtype == torch.bool


def test_the_exchange_of_another_round_is_not_learned_from() -> None:
    found = stream(number=1)
    found.group(4)
    with pytest.raises(RunFailed, match="round 2, and the exchange at hand is that of round 1"):
        found.group(7)
    (alone,) = SPEC.open(client(), seed=1).group(2)  # nothing was ever exchanged: its own rows are all there is
    assert (alone.ids < 40).all()


def test_an_exchange_of_unknown_samples_is_refused() -> None:
    found = SPEC.open(client(), seed=1)
    for stranger in (3, 999):
        with pytest.raises(ValueError, match="proxy set"):
            found.receive(1, torch.tensor([stranger]), torch.ones(1, 5) / 5)


@pytest.mark.parametrize("micro_batch", [1, 4, [6, 2]])
def test_groups_do_not_depend_on_the_micro_batch_split(micro_batch: Any) -> None:
    whole, split = stream(), stream(micro_batch=micro_batch)
    for step in range(5):
        assert_same(joined(split.group(step)), joined(whole.group(step)))
        rows = [torch.cat([b.extra[COVERED] for b in source.group(step)]) for source in (whole, split)]
        assert torch.equal(*rows)


def test_a_client_is_whole_on_whichever_rank_asks() -> None:
    """What leaves one of several ranks without a sample is no fault here: 20 rows in batches of 19, one covered sample."""
    odd = replace(SPEC, batch_size=19)
    for rank in range(2):
        for found, alone in ((stream(rank=rank, world=2), stream()), (stream(odd, rows=1, rank=rank, world=2), stream(odd, rows=1))):
            for step in range(5):
                assert_same(joined(found.group(step)), joined(alone.group(step)))
                assert len(found.group(step)[0].ids) > 0


def test_a_step_s_batch_depends_on_the_step_alone() -> None:
    walked, jumped = stream(), stream()
    for step in range(4):
        walked.group(step)
    assert_same(joined(walked.group(4)), joined(jumped.group(4)))
    assert walked.state_dict() == {}
    drawn = [tuple(walked.group(step)[0].ids.tolist()) for step in (2, 3, 4)]
    assert len(set(drawn)) == 3


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(Refused, match="add up"):
        SPEC.open(client(), seed=0, micro_batch=[5, 2])
    with pytest.raises(ValueError, match="a round has 5 steps"):
        Federated(local_steps=2, distill_steps=3, steps_per_epoch=6)
    for wrong in ({"batch_size": 0}, {"proxy_batch_size": 0}, {"local_steps": 0}, {"distill_steps": -1}):
        with pytest.raises(ValueError, match="at least"):
            Federated(**wrong)


def test_the_option_states_every_field() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf" / "source" / "federated.yaml").read_text())
    assert node.pop("_target_") == "kdrun.source.federated.Federated"
    steps = [node.pop(key) for key in ("local_steps", "distill_steps")]
    assert steps == ["${oc.select:plan.local_steps,8}", "${oc.select:plan.distill_steps,16}"]
    assert node == {k: v for k, v in vars(Federated()).items() if k in node}
    assert len(node) + 2 == len(vars(Federated()))
