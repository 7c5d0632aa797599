"""Texts that a network writes for its own training: a function of weights, seed, step and sample; laid out so that nothing shifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdrun.dataset.base import Data
from kdrun.dataset.sums import LENGTH, SYMBOLS, SumData
from kdrun.dataset.tokens import POSITIONS, Ragged, Sample, TokenSplit
from kdrun.dataset.vocabulary import Symbols
from kdrun.errors import Refused
from kdrun.losses.policy import group_advantages, log_ratio
from kdrun.source.loader import Loader
from kdrun.source.rollout import ADVANTAGE, BEHAVIOUR, REWARD, Rollout
from kdrun.student.sum_policy import SumPolicy
from kdrun.student.taps import ask
from kdrun.teacher.context import INPUTS, SHIFT
from kdrun.types import Batch, Writes
from tests.dataset.texts import V, tiny

EOS = 3


def sums(rows: int = 20) -> Data:
    return SumData(n_train=rows, n_test=4).load()


def uneven(rows: int = 9) -> Data:
    """Prompts of 1 to 5 tokens, an end of text, and completions that are rewarded by their length."""
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(rows):
        before, after = 1 + i % 5, 2 + i % 3
        made.append([Sample(torch.randint(4, V, (before + after,), generator=g).tolist(), [j >= before for j in range(before + after)])])
    split = TokenSplit.of(Ragged.of(made), 100 + torch.arange(rows))
    words = Symbols(tuple(f"w{i}" for i in range(V)), eos=EOS)
    return Data("uneven", words.names, (8,), (), (), {"train": split}, 200, vocabulary=words, reward=lambda r, t: float(len(t)))


def policy(seed: int = 0) -> SumPolicy:
    torch.manual_seed(seed)
    return SumPolicy(SYMBOLS.size)


def group(data: Data, network: nn.Module, step: int = 0, seed: int = 1, teacher: nn.Module | None = None, **values: Any) -> list[Batch]:
    """The micro-batches of one step; `values` of the source, and rank, world and micro_batch."""
    where = {key: values.pop(key) for key in ("rank", "world", "micro_batch") if key in values}
    stream = Rollout(**{"batch_size": 6, "max_new_tokens": LENGTH, **values}).open(data, seed=seed, **where)
    stream.attach(network, teacher)
    return list(stream.group(step))


def rows(batches: list[Batch]) -> list[tuple[int, list[int], list[int]]]:
    """(id, prompt, text) of every row, in order."""
    found = []
    for batch in batches:
        for ids, x, y in zip(batch.ids.tolist(), batch.inputs, batch.targets, strict=True):
            n = int((y >= 0).int().argmax())
            found.append((ids, x[: n + 1].tolist(), y[y >= 0].tolist()))
    return found


# -- what is written ------------------------------------------------------------------------------------------------------


def test_the_same_weights_seed_and_step_write_the_same_texts() -> None:
    data, network = sums(), policy()
    first = rows(group(data, network))
    torch.manual_seed(99)
    assert rows(group(data, network)) == first
    others = [group(data, network, seed=2), group(data, network, step=1), group(data, policy(1)), group(data, network, step=4)]
    assert all(rows(other) != first for other in others)  # 4: a new epoch


def test_a_prompt_that_comes_again_in_the_next_epoch_is_answered_anew() -> None:
    data, network = sums(6), policy()
    first, second = ({ids: text for ids, _, text in rows(group(data, network, step))} for step in (0, 1))
    assert first.keys() == second.keys()
    assert sum(first[ids] != second[ids] for ids in first) >= 5


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("per_prompt", [1, 2])
def test_ranks_write_together_what_one_writes(world: int, per_prompt: int) -> None:
    data, network = uneven(14), tiny()
    whole = rows(group(data, network, batch_size=7, per_prompt=per_prompt))
    parts = [rows(group(data, network, batch_size=7, per_prompt=per_prompt, rank=rank, world=world)) for rank in range(world)]
    assert [row for part in parts for row in part] == whole
    assert len(whole) == 7 * per_prompt


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 50])
def test_micro_batches_hold_the_same_texts(micro_batch: int) -> None:
    data, network = uneven(), tiny()
    whole, cut = group(data, network, per_prompt=2), group(data, network, per_prompt=2, micro_batch=micro_batch)
    assert rows(cut) == rows(whole)
    assert max(len(batch.ids) for batch in cut) <= micro_batch
    for name in (BEHAVIOUR, ADVANTAGE, REWARD):
        assert torch.equal(torch.cat([batch.extra[name] for batch in cut]), whole[0].extra[name])


def test_all_ranks_have_the_same_number_of_micro_batches() -> None:
    """5 prompts are 3 and 2: a rank with one piece less would be waited for in collectives of the forward pass."""
    data, network = sums(), policy()
    pieces = [group(data, network, batch_size=5, rank=rank, world=2, micro_batch=2) for rank in range(2)]
    assert [[len(batch.ids) for batch in part] for part in pieces] == [[2, 1], [1, 1]]
    tail = [group(sums(8), network, step=1, batch_size=5, rank=rank, world=2, micro_batch=1) for rank in range(2)]
    assert [[len(batch.ids) for batch in part] for part in tail] == [[1, 1], [1]]


def test_copies_of_a_prompt_stand_together_and_differ() -> None:
    found = rows(group(sums(), policy(), per_prompt=4))
    assert len(found) == 24
    for i in range(0, 24, 4):
        assert len({ids for ids, _, _ in found[i : i + 4]}) == len({tuple(prompt) for _, prompt, _ in found[i : i + 4]}) == 1
        assert len({tuple(text) for _, _, text in found[i : i + 4]}) > 1
    # ids from 0 on: the draws of sample 1 are not those of another's copies
    assert len({tuple(text) for _, _, text in found}) > 20


def test_a_text_ends_with_the_end_of_text_and_nothing_beyond_is_scored() -> None:
    batch = group(uneven(), tiny(), max_new_tokens=12, batch_size=9)[0]
    texts = [text for _, _, text in rows([batch])]
    ended = [EOS in text for text in texts]
    assert any(ended)
    for text, is_over in zip(texts, ended, strict=True):
        assert text.index(EOS) == len(text) - 1 if is_over else len(text) == 12


# -- how it is laid out ---------------------------------------------------------------------------------------------------


def test_inputs_targets_and_positions_are_those_of_given_texts() -> None:
    data = uneven()
    batch = group(data, tiny(), batch_size=9)[0]
    found = rows([batch])
    given = [[Sample([*prompt, *text], [False] * len(prompt) + [True] * len(text))] for _, prompt, text in found]
    split = TokenSplit.of(Ragged.of(given), batch.ids)
    expected = Data("again", data.class_names, (16,), (), (), {"train": split}, 200, vocabulary=data.vocabulary)
    same = expected.rows("train", torch.arange(9), torch.zeros(9, dtype=torch.int64), seed=0)
    assert torch.equal(batch.inputs, same.inputs)
    assert torch.equal(batch.targets, same.targets)
    assert torch.equal(batch.extra[POSITIONS], same.extra[POSITIONS])
    original = data.split("train").storage
    assert isinstance(original, Ragged)
    for ids, prompt, _ in found:
        begin = int(original.offsets[ids - 100])
        assert original.tokens[begin : begin + len(prompt)].tolist() == prompt


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.1])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_behaviour_stands_beside_its_token_so_the_ratio_begins_at_one(kind: str, temperature: float) -> None:
    network = tiny(kind)
    (batch,) = group(uneven(), network, batch_size=9, temperature=temperature)
    with torch.no_grad():
        said = torch.log_softmax(ask(network, batch).double() / temperature, -1)
    scored = batch.targets >= 0
    own = said.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    ratio = log_ratio(own, batch.extra[BEHAVIOUR])
    torch.testing.assert_close(ratio[scored], torch.zeros_like(ratio[scored]), rtol=0, atol=2e-6)
    assert (batch.extra[BEHAVIOUR][~scored] == 0).all()
    assert len(set(scored.sum(1).tolist())) > 1  # of uneven length, so that a shift would show


def test_rewards_become_advantages_within_a_prompt_on_every_scored_token() -> None:
    (batch,) = group(uneven(), tiny(), per_prompt=4, max_new_tokens=9)
    lengths = (batch.targets >= 0).sum(1)
    assert torch.equal(batch.extra[REWARD], lengths.float())
    expected = group_advantages(lengths.float().view(-1, 4), "unbiased").flatten()
    assert expected.unique().numel() > 2
    scored = batch.targets >= 0
    assert torch.equal(batch.extra[ADVANTAGE], torch.where(scored, expected[:, None], 0.0))


def test_advantages_are_of_the_whole_group_however_it_is_cut() -> None:
    whole, cut = group(uneven(), tiny(), per_prompt=4), group(uneven(), tiny(), per_prompt=4, micro_batch=3)
    assert torch.equal(torch.cat([b.extra[ADVANTAGE] for b in cut]), whole[0].extra[ADVANTAGE])


def test_data_without_a_reward_bring_none() -> None:
    data = uneven()
    object.__setattr__(data, "reward", None)
    (batch,) = group(data, tiny())
    assert not {REWARD, ADVANTAGE} & batch.extra.keys()


def test_a_privileged_reader_gets_its_own_prompt_before_the_same_text() -> None:
    (batch,) = group(sums(), policy())
    assert (batch.extra[SHIFT] == LENGTH + 1).all()
    for x, theirs, text in zip(batch.inputs, batch.extra[INPUTS], (text for _, _, text in rows([batch])), strict=True):
        digits = x[:LENGTH]
        reference = (digits.cumsum(0) % 10).tolist()
        assert SYMBOLS.decode(theirs.tolist()).split() == [
            *map(str, digits.tolist()),
            ":",
            *map(str, reference),
            "=",
            *map(str, text[:-1]),
        ] or any(token >= 10 for token in text)
        assert theirs[-LENGTH + 1 :].tolist() == text[:-1]


# -- mixing, writers, refusals --------------------------------------------------------------------------------------------


def test_a_share_of_the_steps_is_written_and_the_others_are_the_datas_own() -> None:
    data, network = sums(400), policy()
    stream = Rollout(batch_size=2, max_new_tokens=2, share=0.3).open(data, seed=5)
    stream.attach(network, None)
    own = Loader(batch_size=2).open(data, seed=5)
    written = 0
    for step in range(100):
        (batch,) = stream.group(step)
        if BEHAVIOUR in batch.extra:
            written += 1
        else:
            (given,) = own.group(step)
            assert torch.equal(batch.inputs, given.inputs)
            assert torch.equal(batch.targets, given.targets)
    assert written == pytest.approx(30, abs=14)  # three standard deviations


@pytest.mark.parametrize(("share", "written"), [(0.0, 0), (1.0, 20)])
def test_shares_at_their_ends(share: float, written: int) -> None:
    stream = Rollout(batch_size=2, max_new_tokens=2, share=share).open(sums(400), seed=5)
    stream.attach(policy(), None)
    assert sum(BEHAVIOUR in stream.group(step)[0].extra for step in range(20)) == written


def test_steps_of_data_are_cut_into_micro_batches_too() -> None:
    stream = Rollout(batch_size=6, share=0.0).open(sums(), seed=5, micro_batch=2)
    stream.attach(policy(), None)
    assert [len(batch.ids) for batch in stream.group(0)] == [2, 2, 2]


def test_the_teacher_writes_where_it_is_asked_to() -> None:
    data, student, teacher = sums(), policy(), policy(1)
    assert rows(group(data, student, teacher=teacher, writer="teacher")) == rows(group(data, teacher))
    assert rows(group(data, student, teacher=teacher)) == rows(group(data, student))
    with pytest.raises(Refused, match=r"source\.writer"):
        group(data, student, writer="teacher")


def test_what_was_written_is_counted() -> None:
    stream = Rollout(batch_size=6, max_new_tokens=4).open(sums(), seed=1)
    stream.attach(policy(), None)
    assert isinstance(stream, Writes)
    assert set(stream.report().values()) == {0}
    for step in range(3):
        stream.group(step)
    assert stream.report() == {"generated_tokens": 3 * 6 * 4, "fresh_texts": 18, "replayed_texts": 0, "given_texts": 0}
    assert stream.seconds() > 0
    assert stream.state_dict() == {}


def test_steps_of_an_epoch_can_be_said() -> None:
    assert Rollout(batch_size=6).open(sums(), seed=1).steps_per_epoch == 4
    assert Rollout(batch_size=6, steps_per_epoch=3).open(sums(), seed=1).steps_per_epoch == 3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"per_prompt": 0}, "per_prompt"),
        ({"share": 1.5}, "share"),
        ({"writer": "nobody"}, "writer"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}="):
        Rollout(**values)


def test_data_that_are_no_text_and_sizes_that_cannot_fit_are_refused() -> None:
    with pytest.raises(Refused, match=r"micro_batch"):
        Rollout(batch_size=6).open(sums(), seed=1, micro_batch=[4, 2])
    with pytest.raises(Refused, match=r"source\.batch_size"):
        Rollout(batch_size=1).open(sums(), seed=1, rank=0, world=2)
    from tests.source.test_loader import data as pictures

    with pytest.raises(Refused, match="has no prompts"):
        Rollout().open(pictures(), seed=1)
