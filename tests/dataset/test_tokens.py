"""Token sequences: the shift, the padding, several sequences in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrun.dataset.base import taken
from kdrun.dataset.tokens import POSITIONS, Sample, TokenSplit, packed
from kdrun.student.taps import ask
from kdrun.types import Batch
from tests.dataset.texts import alone, batch_of, data_of, samples, tiny

examples = settings(derandomize=True, max_examples=40, deadline=None)
LENGTHS = [5, 9, 2, 7]


def losses(network: Any, batch: Batch) -> list[Tensor]:
    """-log q of the scored tokens of each row."""
    rows = zip(ask(network, batch), batch.targets, strict=True)
    return [F.cross_entropy(z[y >= 0], y[y >= 0], reduction="none") for z, y in rows]


def slopes(network: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """Gradient of the sum of all losses."""
    total = torch.cat([row for batch in batches for row in losses(network, batch)]).sum()
    return list(torch.autograd.grad(total, list(network.parameters())))


def test_position_i_scores_token_i_plus_1() -> None:
    batch = batch_of([[Sample([5, 6, 7, 8], [False, False, True, True])]])
    assert batch.inputs.tolist() == [[5, 6, 7]]
    assert batch.targets.tolist() == [[-1, 7, 8]]
    assert batch.extra[POSITIONS].tolist() == [[0, 1, 2]]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def test_the_first_token_of_a_sequence_is_never_scored() -> None:
    """Nothing comes before it; in a packed row the last token of another sequence does."""
    both = [Sample([1, 2, 3], [True] * 3), Sample([4, 5], [True] * 2)]
    batch = batch_of([both])
    assert batch.inputs.tolist() == [[1, 2, 3, 4]]
    assert batch.targets.tolist() == [[2, 3, -1, 5]]
    assert batch.extra[POSITIONS].tolist() == [[0, 1, 2, 0]]


def test_rows_are_padded_to_the_longest_of_the_batch() -> None:
    rows = alone(samples(LENGTHS))
    assert batch_of(rows, pad=3).inputs.shape == (4, 8)
    short = batch_of(rows, pad=3, index=torch.tensor([2, 0]))
    assert short.inputs.shape == (2, 4)
    assert short.inputs[0, 1:].tolist() == [3, 3, 3]
    assert short.targets[0].tolist() == [-1, -1, -1, -1]
    assert short.extra[POSITIONS].tolist() == [[0, 1, 2, 3]] * 2  # padding goes on counting: no sequence begins there


def test_a_row_without_a_token_to_score_is_a_row_all_the_same() -> None:
    batch = batch_of(alone([Sample([4], [True]), Sample([4, 5], [True, False])]))
    assert batch.inputs.shape == (2, 1)
    assert batch.targets.tolist() == [[-1], [-1]]


@examples
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=8), st.integers(0, 10**6), st.integers(1, 4))
def test_every_scored_token_is_a_target_once_and_in_its_place(lengths: list[list[int]], seed: int, size: int) -> None:
    rows = [samples(row, seed + i, prompt=i % 3) for i, row in enumerate(lengths)]
    data = data_of(rows)
    storage: Any = data.splits["train"].storage
    expected = [[t for s in row for t, learned in [*zip(s.tokens, s.scored, strict=True)][1:] if learned] for row in rows]
    found = [y[y >= 0].tolist() for batch in data.batches("train", size) for y in batch.targets]
    assert found == expected
    assert storage.scored_counts().tolist() == [len(row) for row in expected]
    assert storage.lengths().tolist() == [sum(len(s.tokens) for s in row) for row in rows]


def test_a_subset_has_the_rows_and_ids_of_the_whole() -> None:
    rows = alone(samples(LENGTHS))
    whole = data_of(rows)
    part = taken(whole.splits["train"], torch.tensor([3, 1]))
    assert isinstance(part, TokenSplit)
    subset = replace(whole, splits={"train": part})
    mine = subset.rows("train", torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64), seed=0)
    theirs = whole.rows("train", torch.tensor([1, 3]), torch.zeros(2, dtype=torch.int64), seed=0)
    assert mine.ids.tolist() == theirs.ids.tolist() == [1, 3]
    assert torch.equal(mine.inputs, theirs.inputs)
    assert torch.equal(mine.targets, theirs.targets)
    assert torch.equal(mine.extra[POSITIONS], theirs.extra[POSITIONS])
    assert subset.fingerprint != whole.fingerprint


def test_fingerprint_tells_token_ids_what_is_scored_how_it_is_packed_and_the_padding() -> None:
    one, two = Sample([1, 2, 3], [False, True, True]), Sample([4, 5, 6], [False, True, True])
    rows = {
        "plain": [[one], [two]],
        "another id": [[one], [two._replace(tokens=[4, 5, 7])]],
        "one scored less": [[one], [two._replace(scored=[False, False, True])]],
        "packed": [[one, two]],
        "cut elsewhere": [[one._replace(tokens=[1, 2], scored=[False, True])], [Sample([3, 4, 5, 6], [False, False, True, True])]],
    }
    prints = {name: data_of(value).fingerprint for name, value in rows.items()}
    prints["another padding"] = data_of(rows["plain"], pad=1).fingerprint
    assert len(set(prints.values())) == len(prints)
    assert data_of(rows["plain"]).fingerprint == prints["plain"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_changes_no_logit_no_loss_and_no_gradient(name: str) -> None:
    network, rows = tiny(name), alone(samples(LENGTHS))
    together = batch_of(rows, pad=5)
    one_by_one = [batch_of(rows, index=torch.tensor([i])) for i in range(len(rows))]
    said = ask(network, together)
    for i, batch in enumerate(one_by_one):
        torch.testing.assert_close(said[i, : batch.inputs.shape[1]], ask(network, batch)[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(losses(network, together)[i], losses(network, batch)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes(network, [together]), slopes(network, one_by_one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_packed_row_says_and_teaches_what_its_sequences_do_alone(name: str) -> None:
    network, sequences = tiny(name), samples(LENGTHS)
    row = batch_of([sequences])
    each = [batch_of([[s]]) for s in sequences]
    said = ask(network, row)[0]
    begin = 0
    for sequence, batch in zip(sequences, each, strict=True):
        length = len(sequence.tokens)
        torch.testing.assert_close(said[begin : begin + length - 1], ask(network, batch)[0], rtol=1e-6, atol=1e-6)
        begin += length
    torch.testing.assert_close(losses(network, row)[0], torch.cat([losses(network, b)[0] for b in each]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes(network, [row]), slopes(network, each), rtol=1e-5, atol=1e-6)


def test_a_packed_row_beside_a_shorter_one_is_not_disturbed_by_its_padding() -> None:
    network, sequences = tiny(), samples([4, 5, 3])
    both = batch_of([sequences[:2], sequences[2:]])
    torch.testing.assert_close(losses(network, both)[0], losses(network, batch_of([sequences[:2]]))[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses(network, both)[1], losses(network, batch_of([sequences[2:]]))[0], rtol=1e-6, atol=1e-6)


@examples
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 16))
def test_packing_keeps_every_sequence_whole_in_order_and_no_row_too_long(lengths: list[int], room: int) -> None:
    sequences = samples(lengths)
    rows = list(packed(sequences, room))
    assert [s for row in rows for s in row] == sequences
    totals = [sum(len(s.tokens) for s in row) for row in rows]
    assert all(total <= room or len(row) == 1 for total, row in zip(totals, rows, strict=True))
    after = [len(row[0].tokens) for row in rows[1:]]
    assert all(total + following > room for total, following in zip(totals, after, strict=False))  # as full as it can be


def test_streamed_rows_are_the_fetched_ones() -> None:
    split = data_of(alone(samples(LENGTHS))).splits["train"]
    requests = [split.request(torch.tensor(i), torch.zeros(2, dtype=torch.int64), 0, False) for i in ([0, 1], [2, 3])]
    for request, rows in split.storage.stream(iter(requests), torch.device("cpu")):
        assert torch.equal(rows, split.storage.fetch(request, torch.device("cpu")))
