"""Token sequences of uneven length as a split: one flat tensor, cut and padded batch by batch.

A stored sequence of tokens x_0 ... x_n says of each token whether it is to be learned. A batch holds inputs x_0 ... x_{n-1} and, at
position i, the target x_{i+1} or -1: the shift is made here and nowhere else. Rows are padded on the right to the longest of the batch.
Behind a causal mask what is scored never sees the padding, so no attention mask is needed and padding changes no value.

Several sequences packed into one row keep their own positions from 0: models of transformers read from these where one ends and the
next begins, and attend within each alone. The first token of a sequence is never learned: nothing comes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrun.dataset.base import Request, Split, Storage
from kdrun.types import Batch

POSITIONS = "position_ids"  # as the forward of transformers' models calls them
# Rows of extra that another sequence of the sample brings (`TokenSplit.beside`), after its name and an underscore.
INPUTS, TARGETS, STRETCHES = "inputs", "targets", "stretches"
TEACHER = "teacher"  # the same text in the ids of a teacher with a tokenizer of its own
REJECTED = "rejected"  # the worse completion of a pair
MATCHED = "matched_ids"  # [M, 2], in every batch: ids of the student and of such a teacher that mean the same string


class Sample(NamedTuple):
    """One tokenised sample."""

    tokens: list[int]
    scored: list[bool]  # which of them are to be learned
    aided: Sample | None = None  # the same after the prompt that a privileged teacher reads
    beside: Mapping[str, Sample] | None = None  # further sequences of the same sample: `TEACHER`, `REJECTED`
    ends: list[int] | None = None  # where in the learned text each token ends, in characters; -1: it is not of that text
    stretches: list[int] | None = None  # which of the stretches, that two tokenizers cut alike, each token is of; -1: of none


@dataclass(eq=False)
class Ragged:
    """Implements `kdrun.dataset.base.Storage`: rows int64 [B, 3, T] of inputs, targets (-1: none) and positions, T that of the longest;
    [B, 4, T] with the stretch that the target is of, where stretches are known."""

    tokens: Tensor  # [M] int32, all rows one after the other
    scored: Tensor  # [M] bool
    positions: Tensor  # [M] int32, from 0 in every sequence
    offsets: Tensor  # [N + 1] int64, where each row begins
    pad: int = 0
    prefetches: bool = False
    stretches: Tensor | None = None  # [M] int32

    @staticmethod
    def of(rows: Iterable[Sequence[Sample]], pad: int = 0) -> Ragged:
        """Rows of one or, packed, of several sequences each."""
        tokens: list[int] = []
        scored: list[bool] = []
        positions: list[int] = []
        stretches: list[int] = []
        offsets = [0]
        for row in rows:
            for sequence in row:
                tokens += sequence.tokens
                scored += [False, *sequence.scored[1:]]
                positions += range(len(sequence.tokens))
                stretches += sequence.stretches or []
            offsets.append(len(tokens))
        as_int = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
        known = as_int(stretches) if tokens and len(stretches) == len(tokens) else None
        return Ragged(
            as_int(tokens), torch.tensor(scored, dtype=torch.bool), as_int(positions), torch.tensor(offsets), pad, stretches=known
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [N]."""
        return self.offsets.diff()

    def longest_prompt(self) -> int:
        """Tokens before the first scored one, of the row that has most of them."""
        row = torch.repeat_interleave(torch.arange(len(self)), self.lengths())
        place = torch.arange(len(self.tokens)) - self.offsets[row]
        first = self.lengths().scatter_reduce(0, row[self.scored], place[self.scored], "amin")
        return int(first.max()) if len(self) else 0

    def scored_counts(self) -> Tensor:
        """Scored tokens of each row, int64 [N]."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.scored.cumsum(0)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        begin, end = self.offsets[request.positions], self.offsets[request.positions + 1]
        steps = torch.arange(max(1, int((end - begin).max()) - 1)) if len(begin) else torch.arange(1)
        place = begin[:, None] + steps
        inside = place < end[:, None] - 1
        here, after = place.clamp(max=len(self.tokens) - 1), (place + 1).clamp(max=len(self.tokens) - 1)
        inputs = torch.where(inside, self.tokens[here].long(), self.pad)
        targets = torch.where(inside & self.scored[after], self.tokens[after].long(), -1)
        # Padding goes on counting: it is no sequence of its own.
        positions = torch.where(inside, self.positions[here].long(), self.positions[end - 1].long()[:, None] + place - end[:, None] + 1)
        rows = [inputs, targets, positions]
        if self.stretches is not None:
            rows.append(torch.where(targets >= 0, self.stretches[after].long(), -1))
        return torch.stack(rows, 1).to(device, non_blocking=True)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, self.fetch(request, device)

    def digest(self, into: Any) -> None:
        known = () if self.stretches is None else (self.stretches,)
        for part in (self.tokens, self.scored, self.positions, self.offsets, *known):
            into.update(part.contiguous().numpy().data)
        into.update(f"padded with {self.pad}".encode())


@dataclass(eq=False)
class RandomTokens:
    """Storage of rows [3, T] without content, for planning without data."""

    rows: int
    length: int
    tokens: int
    prefetches: bool = False

    def __len__(self) -> int:
        return self.rows

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        drawn = torch.randint(self.tokens, (len(request.positions), 2, self.length), device=device)
        place = torch.arange(self.length, device=device).expand(len(drawn), 1, -1)
        return torch.cat([drawn, place], 1)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, self.fetch(request, device)

    def digest(self, into: Any) -> None:
        into.update(f"{self.rows} rows of {self.length} of {self.tokens} tokens".encode())


@dataclass(frozen=True, eq=False)
class TokenSplit(Split):
    """A split whose targets lie beside its inputs. Its own `targets` [N] are 0: a row has no label but its tokens'."""

    privileged: Storage | None = None  # the same rows after the prompts that a privileged teacher reads
    beside: Mapping[str, Storage] = field(default_factory=dict)  # further sequences of every row, by name; they come with every batch

    @staticmethod
    def of(storage: Storage, ids: Tensor, privileged: Storage | None = None, **extra: Tensor) -> TokenSplit:
        return TokenSplit(storage, torch.zeros(len(ids), dtype=torch.int64), ids, extra, privileged=privileged)

    def batch(self, request: Request, inputs: Tensor, device: torch.device) -> Batch:
        rows = super().batch(request, inputs[:, 0], device)
        extra = {**rows.extra, POSITIONS: inputs[:, 2]} | ({STRETCHES: inputs[:, 3]} if inputs.shape[1] > 3 else {})
        for name, storage in self.beside.items():
            theirs = storage.fetch(request, device)
            extra |= {f"{name}_{row}": theirs[:, i] for i, row in enumerate((INPUTS, TARGETS, POSITIONS, STRETCHES)[: theirs.shape[1]])}
        return rows._replace(targets=inputs[:, 1], extra=extra)


def beside(batch: Batch, name: str) -> Batch:
    """The same samples as another of their sequences, e.g. `REJECTED`."""
    inputs, targets, positions = (batch.extra[f"{name}_{row}"] for row in (INPUTS, TARGETS, POSITIONS))
    return batch._replace(inputs=inputs, targets=targets, extra={POSITIONS: positions})


def prompts_of(rows: Tensor) -> tuple[list[Tensor], list[list[int]]]:
    """(prompts [T_i], the scored tokens that follow them) of stored rows [B, 3, T]: a prompt ends where the first token is scored."""
    inputs, targets = rows[:, 0], rows[:, 1]
    scored = targets >= 0
    first = torch.where(scored.any(1), scored.int().argmax(1), inputs.shape[1] - 1).tolist()
    return [row[: n + 1] for row, n in zip(inputs, first, strict=True)], [y[y >= 0].tolist() for y in targets]


def packed(sequences: Iterable[Sample], length: int) -> Iterator[list[Sample]]:
    """Rows of whole sequences, in their order, each row as full as `length` tokens allow; a longer sequence is a row of its own."""
    row: list[Sample] = []
    room = length
    for sequence in sequences:
        if row and len(sequence.tokens) > room:
            yield row
            row, room = [], length
        row.append(sequence)
        room -= len(sequence.tokens)
    if row:
        yield row
