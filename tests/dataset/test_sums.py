"""Running sums: what a row is, what a practice row is, and who is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdrun.dataset.base import Data, Request, taken
from kdrun.dataset.sums import BASE, COLON, EQUALS, LENGTH, MISSING, REPLACED, SYMBOLS, SumData, last_is_right
from kdrun.dataset.tokens import POSITIONS, TokenSplit, prompts_of

CPU = torch.device("cpu")


def world(**values: Any) -> Data:
    return SumData(**{"n_train": 400, "n_test": 50, **values}).load()


def rows(data: Data, split: str = "train", view: int = 0, seed: int = 0) -> Tensor:
    part = data.split(split)
    every = torch.arange(len(part))
    return part.storage.fetch(Request(every, part.ids, torch.full_like(every, view), seed, True), CPU)


class Told:
    """Practice rows taken apart: digits, entries of the reference (-1: no reference), what was written, what is right; [N, LENGTH]."""

    def __init__(self, rows: Tensor) -> None:
        inputs, targets = rows[:, 0], rows[:, 1]
        self.digits, self.aided = inputs[:, :LENGTH], inputs[:, LENGTH] == COLON
        self.hints = torch.where(self.aided[:, None], inputs[:, LENGTH + 1 : 2 * LENGTH + 1], -1)
        self.right = torch.stack([y[y >= 0] for y in targets])
        start = torch.where(self.aided, 2 * LENGTH + 1, LENGTH)
        assert (inputs.gather(1, start[:, None]) == EQUALS).all()
        self.before = inputs.gather(1, start[:, None] + torch.arange(LENGTH))  # the equals sign, then what was written
        self.sums = self.digits.cumsum(1) % BASE


def test_a_row_is_digits_and_their_running_sums() -> None:
    data = world()
    batch = data.rows("train", torch.arange(5), torch.zeros(5, dtype=torch.int64), seed=0)
    digits = batch.inputs[:, :LENGTH]
    sums = digits.cumsum(1) % BASE
    assert (batch.inputs[:, LENGTH] == EQUALS).all()
    assert torch.equal(batch.inputs[:, LENGTH + 1 :], sums[:, :-1])
    assert torch.equal(batch.targets[:, LENGTH:], sums)
    assert (batch.targets[:, :LENGTH] == -1).all()
    assert torch.equal(batch.extra[POSITIONS][0], torch.arange(2 * LENGTH))
    prompts, references = prompts_of(torch.stack([batch.inputs, batch.targets], 1))
    assert SYMBOLS.decode(prompts[0].tolist()) == " ".join(map(str, digits[0].tolist())) + " ="
    assert references == sums.tolist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_privileged_prompt_holds_the_reference_of_the_same_problem(split: str) -> None:
    part = world().split(split)
    assert isinstance(part, TokenSplit)
    assert part.privileged is not None
    every = torch.arange(len(part))
    request = Request(every, part.ids, torch.zeros_like(every), 0, False)
    own, _ = prompts_of(part.storage.fetch(request, CPU))
    theirs, references = prompts_of(part.privileged.fetch(request, CPU))
    for mine, other, reference in zip(own, theirs, references, strict=True):
        assert other.tolist() == [*mine[:LENGTH].tolist(), COLON, *reference, EQUALS]


def test_some_rows_of_a_split_keep_their_own_privileged_prompts() -> None:
    whole = world().split("train")
    chosen = torch.tensor([7, 2, 300])
    part = taken(whole, chosen)
    assert isinstance(part, TokenSplit)
    assert part.privileged is not None
    three = torch.arange(3)
    got = part.privileged.fetch(Request(three, part.ids, torch.zeros_like(three), 0, False), CPU)
    assert torch.equal(
        got[:, 0, :LENGTH], part.storage.fetch(Request(three, part.ids, torch.zeros_like(three), 0, False), CPU)[:, 0, :LENGTH]
    )


def test_problems_belong_to_the_data_and_splits_share_none_by_id() -> None:
    first, again, other = world(), world(), world(seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.split("test").ids, torch.arange(400, 450))
    assert not torch.equal(rows(first)[:50, 0, :LENGTH], rows(first, "test")[:, 0, :LENGTH])
    assert first.classes == SYMBOLS.size == 13
    assert first.input_shape == (2 * LENGTH + 2 + LENGTH - 1,)


def test_practice_rows_are_replayed_by_seed_id_and_view() -> None:
    data = world(practice=True)
    assert torch.equal(rows(data, view=3), rows(data, view=3))
    whole = rows(data, view=3)
    part = data.split("train")
    some = torch.tensor([11, 5])
    alone = part.storage.fetch(Request(some, part.ids[some], torch.full_like(some, 3), 0, True), CPU)
    width = alone.shape[2]
    assert torch.equal(alone[:, :2], whole[some][:, :2, :width])
    for other in (rows(data, view=4), rows(data, view=3, seed=1)):
        assert not torch.equal(other[:, 0, : LENGTH + 1], whole[:, 0, : LENGTH + 1]) or not torch.equal(other, whole)
        assert torch.equal(other[:, 0, :LENGTH], whole[:, 0, :LENGTH])  # the problem stays


@pytest.mark.parametrize("target", ["jumping", "consistent"])
def test_practice_targets_are_what_they_are_called(target: str) -> None:
    told = Told(rows(world(practice=True, target=target, unaided=0.3, n_train=2000)))
    last = torch.where(told.before >= BASE, 0, told.before)  # the start counts as 0
    expected = told.sums if target == "jumping" else (last + told.digits) % BASE
    assert torch.equal(told.right[told.aided], expected[told.aided])
    assert torch.equal(told.right[~told.aided], told.sums[~told.aided])
    differ = (last + told.digits) % BASE != told.sums
    assert differ[told.aided].any()  # the two kinds are not one


def test_practice_rows_are_drawn_as_often_as_they_say() -> None:
    told = Told(rows(world(practice=True, unaided=0.3, n_train=6000)))
    assert told.aided.double().mean() == pytest.approx(0.7, abs=0.02)
    aided = told.hints[told.aided]
    missing = aided == MISSING
    assert ((aided == told.sums[told.aided]) | missing).all()
    assert missing.double().mean() == pytest.approx(0.25, abs=0.01)  # half of the entries of half of the rows
    assert (missing.sum(1) == 0).double().mean() == pytest.approx(0.5 + 0.5 * 0.5**LENGTH, abs=0.02)
    wrong = told.before[:, 1:] != told.sums[:, :-1]
    assert wrong[told.aided].double().mean() == pytest.approx(REPLACED * (BASE - 1) / BASE, abs=0.01)
    assert not wrong[~told.aided].any()  # without the reference every prefix is right


@pytest.mark.parametrize(("unaided", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_shares_of_practice_at_their_ends(unaided: float, share: float) -> None:
    assert Told(rows(world(practice=True, unaided=unaided))).aided.double().mean() == share


def test_practice_leaves_the_test_rows_alone_and_is_other_data() -> None:
    plain, practised = world(), world(practice=True)
    assert torch.equal(rows(plain, "test"), rows(practised, "test"))
    kinds = {
        world(**v).fingerprint
        for v in ({}, {"practice": True}, {"practice": True, "target": "consistent"}, {"practice": True, "unaided": 0.5})
    }
    assert len(kinds) == 4


@pytest.mark.parametrize(
    ("written", "right"),
    [([3, 4, 8], 1), ([0, 0, 8], 1), ([3, 4, 7], 0), ([], 0), ([8], 0), ([3, 4, 8, 8], 0)],
)
def test_the_verifier_looks_at_the_last_of_all_sums(written: list[int], right: int) -> None:
    assert last_is_right([3, 4, 8], written) == right


@pytest.mark.parametrize("values", [{"n_train": 0}, {"n_test": 0}, {"target": "leaping"}, {"unaided": 1.5}])
def test_settings_that_cannot_be_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        SumData(**values)
