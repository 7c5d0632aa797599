"""What a teacher wrote, row by row: prompts with completions, where each comes from, and the same as data to train on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.events import HEAD
from kdrun.dataset.tokens import Ragged, Sample, TokenSplit, prompts_of

AT_ONCE = 2000  # rows of a split that are looked at together


@dataclass(frozen=True, eq=False)
class Prompts:
    """The different prompts of a split, in the order of their first rows."""

    tokens: list[list[int]]
    ids: Tensor  # [P] int64, of their first rows
    heads: Tensor  # [P] int64

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Completions [N], in the order of their ids."""

    prompts: Prompts
    prompt: Tensor  # [N] int64, the place of its prompt
    draw: Tensor  # [N] int64, which of its prompt's completions it is
    log_prob: Tensor  # [N] float64, of the completion under the distribution that it was drawn from
    completions: list[list[int]]
    samples: int  # completions that were drawn of each prompt

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def ids(self) -> Tensor:
        """One for every completion that was drawn, whatever became of the others; int64 [N]."""
        return self.prompts.ids[self.prompt] * self.samples + self.draw

    @property
    def heads(self) -> Tensor:
        return self.prompts.heads[self.prompt]

    def prompt_of(self, row: int) -> list[int]:
        return self.prompts.tokens[int(self.prompt[row])]

    def at(self, positions: Tensor) -> Corpus:
        """Some of its rows."""
        completions = [self.completions[i] for i in positions.tolist()]
        prompt, draw, log_prob = (column[positions] for column in (self.prompt, self.draw, self.log_prob))
        return replace(self, prompt=prompt, draw=draw, log_prob=log_prob, completions=completions)

    def judged(self, data: Data) -> Tensor:
        """What the oracle says of every row, bool [N]."""
        assert data.oracle is not None
        places = self.prompt.tolist()
        rows = zip(places, self.completions, strict=True)
        return torch.tensor([data.oracle(self.prompts.tokens[p], text) > 0 for p, text in rows], dtype=torch.bool)

    def samples_of(self) -> list[Sample]:
        """Token sequences of which the completion is learned."""
        rows = [(self.prompts.tokens[p], text) for p, text in zip(self.prompt.tolist(), self.completions, strict=True)]
        return [Sample([*prompt, *text], [False] * len(prompt) + [True] * len(text)) for prompt, text in rows]

    def as_training(self, data: Data) -> Data:
        """The data with these rows, and no others, to train on. Their ids lie behind those of the data's own."""
        assert data.vocabulary is not None
        extra = {HEAD: self.heads} if HEAD in data.split("train").extra else {}
        rows = Ragged.of(([row] for row in self.samples_of()), data.vocabulary.pad)
        train = TokenSplit.of(rows, data.total_ids + self.ids, None, **extra)
        # The other splits have rows of their own beside their tokens, which a text that was written has not.
        others = {name: part for name, part in data.splits.items() if name != "train"}
        total = data.total_ids * (1 + self.samples)
        return replace(data, splits={"train": train, **others}, total_ids=total)


def prompts_in(data: Data, split: str = "train") -> Prompts:
    """The different prompts of a split of texts."""
    first: dict[tuple[int, ...], int] = {}
    ids: list[int] = []
    heads: list[int] = []
    for batch in data.batches(split, AT_ONCE):
        told, _ = prompts_of(torch.stack([batch.inputs, batch.targets], 1))
        of_event = batch.extra.get(HEAD, batch.ids).tolist()
        for prompt, number, head in zip(told, batch.ids.tolist(), of_event, strict=True):
            tokens = tuple(prompt.tolist())
            if tokens not in first:
                first[tokens] = len(first)
                ids.append(number)
                heads.append(head)
    return Prompts([list(tokens) for tokens in first], torch.tensor(ids), torch.tensor(heads))


def first_of_each(prompt: Tensor, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(positions of the first of all rows with one prompt and one completion, how often each of them is there), int64 [M] both."""
    seen: dict[tuple[int, ...], list[int]] = {}
    for i, (p, text) in enumerate(zip(prompt.tolist(), completions, strict=True)):
        seen.setdefault((p, *text), [i, 0])[1] += 1
    table = torch.tensor(list(seen.values()), dtype=torch.int64).view(-1, 2)
    return table[:, 0], table[:, 1]


def group_split(groups: Tensor, share: float, key: int) -> Tensor:
    """Which rows are held out, bool [N]: one draw for every group, so that no group is on both sides."""
    return rng.uniform(key, groups) < share


def write_provenance(file: Path, corpus: Corpus, data: Data, shared: Mapping[str, Any], columns: Mapping[str, Tensor | None]) -> None:
    """One line of JSON for every row: its texts, where it comes from (`shared`), and what became of it; NaN is written as null."""
    assert data.vocabulary is not None
    decode = data.vocabulary.decode
    ids = corpus.prompts.ids[corpus.prompt].tolist()
    values = {name: column.tolist() for name, column in columns.items() if column is not None}
    with open(file, "w", encoding="utf-8") as handle:
        for i, text in enumerate(corpus.completions):
            own = {name: None if column[i] != column[i] else column[i] for name, column in values.items()}
            row = {"prompt_id": ids[i], "draw": int(corpus.draw[i]), "prompt": decode(corpus.prompt_of(i)), "completion": decode(text)}
            handle.write(json.dumps({**row, "log_prob": float(corpus.log_prob[i]), **own, **shared}, ensure_ascii=False) + "\n")
