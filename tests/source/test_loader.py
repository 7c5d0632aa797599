from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from kdrun.dataset.augment import Normalise, PadCropFlip
from kdrun.dataset.base import Data, Resident, Split
from kdrun.errors import Refused
from kdrun.source.loader import EpochLoader, Loader
from kdrun.types import Batch


def data(rows: int = 50) -> Data:
    """Images whose ids are not their positions."""
    pixels = torch.randint(0, 256, (rows, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = PadCropFlip(Normalise((0.5,) * 3, (0.25,) * 3), 2, 0.5)
    train = Split(Resident(pixels, transform), torch.arange(rows) % 5, torch.arange(rows) * 2 + 1)
    return Data("toy", tuple("abcde"), (3, 6, 6), (0.5,) * 3, (0.25,) * 3, {"train": train}, 2 * rows + 1)


class Prefetching(Resident):
    """A resident split that claims to work ahead, and counts how often its stream is begun."""

    def __init__(self, inner: Resident) -> None:
        super().__init__(inner.inputs, inner.transform)
        self.prefetches, self.begun = True, 0

    def stream(self, requests: Any, device: torch.device) -> Any:
        self.begun += 1
        return super().stream(requests, device)


def joined(group: list[Batch]) -> dict[str, Tensor]:
    return {f: torch.cat([getattr(b, f) for b in group]) for f in ("inputs", "targets", "ids", "view")}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 16, 100, [16], [1, 15], [3, 9, 4]])
def test_groups_do_not_depend_on_the_micro_batch_split(micro_batch: int | list[int]) -> None:
    plain, split = Loader(16).open(data(), seed=1), Loader(16).open(data(), seed=1, micro_batch=micro_batch)
    for step in range(9):
        pieces = split.group(step)
        assert_same(joined(pieces), joined(plain.group(step)))
        if isinstance(micro_batch, int):
            assert max(len(b.ids) for b in pieces) <= micro_batch
        elif step % 4 < 3:
            assert [len(b.ids) for b in pieces] == micro_batch


def test_a_list_of_sizes_is_scaled_to_the_last_batch() -> None:
    source = Loader(16).open(data(56), seed=1, micro_batch=[2, 10, 4])
    assert [len(b.ids) for b in source.group(3)] == [1, 5, 2]
    tiny = Loader(16).open(data(49), seed=1, micro_batch=[2, 10, 4])
    assert [len(b.ids) for b in tiny.group(3)] == [1]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_reunite_to_the_one_rank_batch(world: int) -> None:
    plain = Loader(16).open(data(55), seed=1)
    ranks = [Loader(16).open(data(55), seed=1, rank=r, world=world, micro_batch=3) for r in range(world)]
    for step in range(plain.steps_per_epoch + 1):
        groups = [source.group(step) for source in ranks]
        assert_same(joined([b for g in groups for b in g]), joined(plain.group(step)))
        sizes = [sum(len(b.ids) for b in g) for g in groups]
        assert max(sizes) - min(sizes) <= 1
        assert len({len(g) for g in groups}) == 1  # layers that gather over ranks must meet equally often


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_epoch_is_a_permutation(drop_last: bool) -> None:
    source = Loader(16, drop_last=drop_last).open(data(), seed=1)
    assert source.steps_per_epoch == (3 if drop_last else 4)
    epochs = []
    for epoch in range(3):
        parts = [joined(source.group(epoch * source.steps_per_epoch + s)) for s in range(source.steps_per_epoch)]
        ids = torch.cat([p["ids"] for p in parts])
        assert len(set(ids.tolist())) == len(ids) == (48 if drop_last else 50)
        assert torch.cat([p["view"] for p in parts]).eq(epoch).all()
        epochs.append(ids)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_any_step_can_be_resumed_at() -> None:
    unbroken = Loader(16).open(data(), seed=1, micro_batch=5)
    expected = [joined(unbroken.group(step)) for step in range(10)]
    for step in (9, 0, 5, 4):
        fresh = Loader(16).open(data(), seed=1, micro_batch=5)
        fresh.load_state_dict(unbroken.state_dict())
        assert_same(joined(fresh.group(step)), expected[step])


def test_seeds_walk_differently() -> None:
    a, b = (joined(Loader(16).open(data(), seed=s).group(0)) for s in (1, 2))
    assert not torch.equal(a["ids"], b["ids"])


def test_views_repeat_when_asked_and_are_new_otherwise() -> None:
    def by_id(source: EpochLoader, epoch: int) -> Tensor:
        rows = joined([b for s in range(4) for b in source.group(4 * epoch + s)])
        return rows["inputs"][rows["ids"].argsort()]

    twice, fresh = Loader(16, views=2).open(data(), seed=1), Loader(16).open(data(), seed=1)
    assert torch.equal(by_id(twice, 0), by_id(twice, 2))
    assert torch.equal(by_id(twice, 1), by_id(fresh, 1))
    assert not torch.equal(by_id(fresh, 0), by_id(fresh, 2))


def test_without_shuffle_and_augmentation_rows_come_as_they_lie() -> None:
    toy = data()
    source = Loader(16, shuffle=False, augment=False).open(toy, seed=1)
    rows = joined([b for s in range(4) for b in source.group(4 + s)])
    assert_same(rows | {"view": torch.zeros(50)}, joined(list(toy.batches("train", 50))) | {"view": torch.zeros(50)})


def test_a_split_that_works_ahead_gives_the_same_batches() -> None:
    toy = data()
    storage = Prefetching(toy.split("train").storage)  # type: ignore[arg-type]
    ahead = Data(
        "toy",
        toy.class_names,
        toy.input_shape,
        toy.mean,
        toy.std,
        {"train": Split(storage, toy.split("train").targets, toy.split("train").ids)},
        101,
    )
    plain, source = Loader(16).open(toy, seed=1, micro_batch=5), Loader(16).open(ahead, seed=1, micro_batch=5)
    for step in (0, 1, 2, 3, 4, 2, 3, 9):
        assert_same(joined(source.group(step)), joined(plain.group(step)))
    assert storage.begun == 3  # begun anew only after a jump


def test_the_last_batch_must_reach_every_rank() -> None:
    with pytest.raises(Refused, match=r"source\.drop_last=true"):
        Loader(16).open(data(49), seed=1, world=2)
    assert Loader(16, drop_last=True).open(data(49), seed=1, world=2).steps_per_epoch == 3


@pytest.mark.parametrize(
    ("loader", "kwargs", "message"),
    [
        (Loader(64, drop_last=True), {}, "50 rows make no batch of 64"),
        (Loader(2), {"world": 3}, "leaves some of 3 ranks without a sample"),
        (Loader(16), {"micro_batch": [8, 7]}, r"sizes \[8, 7\] add up to 15; rank 0 has 16"),
        (Loader(16), {"micro_batch": [8, 8], "world": 2}, "rank 0 has 8 samples"),
        (Loader(16), {"micro_batch": 0}, "hardware.micro_batch"),
        (Loader(16), {"split": "validation"}, "no validation split"),
    ],
)
def test_walks_that_cannot_be_are_refused(loader: Loader, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        loader.open(data(), seed=1, **kwargs)


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"views": 0}])
def test_settings_that_no_run_can_use_are_refused_at_once(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Loader(**kwargs)


def test_it_has_no_state_and_takes_none() -> None:
    source = Loader(16).open(data(), seed=1)
    assert source.state_dict() == {}
    source.feedback(torch.tensor([1]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no state"):
        source.load_state_dict({"position": 3})


def test_the_option_builds() -> None:
    node = yaml.safe_load((Path(__file__).parents[2] / "conf" / "source" / "loader.yaml").read_text())
    assert node.pop("_target_") == "kdrun.source.loader.Loader"
    assert Loader(**node) == Loader()
