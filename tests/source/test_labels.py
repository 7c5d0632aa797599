from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from kdrun.dataset.modes import ModesData
from kdrun.errors import Refused
from kdrun.source.labels import Labels
from kdrun.types import Batch

DATA = ModesData(n_train=16, n_test=16).load()


def joined(group: list[Batch]) -> dict[str, Tensor]:
    return {f: torch.cat([getattr(b, f) for b in group]) for f in ("inputs", "targets", "ids", "view")}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 16, 100, [16], [1, 15], [3, 9, 4]])
def test_groups_do_not_depend_on_the_micro_batch_split(micro_batch: int | list[int]) -> None:
    plain, split = Labels(16).open(DATA, seed=1), Labels(16).open(DATA, seed=1, micro_batch=micro_batch)
    for step in (0, 1, 7, 1000):
        pieces = split.group(step)
        assert_same(joined(pieces), joined(plain.group(step)))
        if isinstance(micro_batch, int):
            assert max(len(b.ids) for b in pieces) <= micro_batch
        else:
            assert [len(b.ids) for b in pieces] == micro_batch


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_reunite_to_the_one_rank_batch(world: int) -> None:
    plain = Labels(16).open(DATA, seed=1)
    ranks = [Labels(16).open(DATA, seed=1, rank=r, world=world, micro_batch=3) for r in range(world)]
    for step in (0, 5):
        groups = [source.group(step) for source in ranks]
        assert_same(joined([b for g in groups for b in g]), joined(plain.group(step)))
        assert len({len(g) for g in groups}) == 1  # layers that gather over ranks must meet equally often


def test_ids_never_come_again() -> None:
    source = Labels(16, steps_per_epoch=3).open(DATA, seed=1)
    parts = [joined(source.group(step)) for step in range(20)]
    ids = torch.cat([p["ids"] for p in parts])
    assert ids.tolist() == list(range(320))
    assert [int(p["view"][0]) for p in parts[:7]] == [0, 0, 0, 1, 1, 1, 2]
    latents = torch.cat([p["inputs"] for p in parts])
    assert len(latents.unique(dim=0)) == 320


def test_labels_are_uniform_over_those_that_are_drawn() -> None:
    rows = joined(Labels(9000, (0, 2)).open(DATA, seed=3).group(4))
    shares = rows["targets"].bincount(minlength=4).double() / 9000
    assert shares[[0, 2]].sum() == 0
    assert abs(float(shares[1]) - 0.5) < 4 * 0.5 / 9000**0.5
    assert rows["inputs"].shape == (9000, 2)
    assert rows["inputs"].mean(0).abs().max() < 4 / 9000**0.5
    assert (rows["inputs"].std(0) - 1).abs().max() < 4 / 18_000**0.5
    assert abs(float(torch.corrcoef(torch.stack([rows["targets"].float(), rows["inputs"][:, 0]]))[0, 1])) < 4 / 9000**0.5


def test_any_step_can_be_resumed_at_and_seeds_differ() -> None:
    source = Labels(16).open(DATA, seed=1)
    expected = [joined(source.group(step)) for step in range(6)]
    fresh = Labels(16).open(DATA, seed=1)
    fresh.load_state_dict(source.state_dict())
    for step in (5, 0, 3):
        assert_same(joined(fresh.group(step)), expected[step])
    other = joined(Labels(16).open(DATA, seed=2).group(0))
    assert not torch.equal(other["targets"], expected[0]["targets"])
    assert not torch.equal(other["inputs"], expected[0]["inputs"])


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        (Labels(2), {"world": 3}, "leaves some of 3 ranks without a sample"),
        (Labels(16), {"micro_batch": [8, 7]}, r"sizes \[8, 7\] add up to 15; rank 0 has 16"),
        (Labels(16), {"micro_batch": 0}, "hardware.micro_batch"),
        (Labels(16, (7,)), {}, "there is no label 7"),
        (Labels(16, (0, 1, 2, 3)), {}, "no label is left"),
    ],
)
def test_streams_that_cannot_be_are_refused(labels: Labels, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        labels.open(DATA, seed=1, **kwargs)


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"steps_per_epoch": 0}])
def test_settings_that_no_run_can_use_are_refused_at_once(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Labels(**kwargs)


def test_it_has_no_state_and_takes_none() -> None:
    source = Labels(16).open(DATA, seed=1)
    assert source.state_dict() == {}
    source.feedback(torch.tensor([1]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no state"):
        source.load_state_dict({"position": 3})


def test_the_option_builds() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf" / "source" / "labels.yaml").read_text())
    assert node.pop("_target_") == "kdrun.source.labels.Labels"
    assert Labels(**node | {"exclude": tuple(node["exclude"])}) == Labels()
