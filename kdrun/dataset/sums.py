"""Running sums: six digits, six sums modulo 10, and a verifier. Arithmetic whose every step can be checked. Ours.

    prompt  d_1 ... d_6 =        completion  r_1 ... r_6,   r_n = (d_1 + ... + d_n) mod 10

A privileged reader's prompt also holds the reference: d_1 ... d_6 : r_1 ... r_6 =. For `practice` rows, on which a policy is pre-trained,
each view of a problem is drawn anew: with or without the reference, some of its entries missing, and, with it, behind a completion whose
tokens are replaced at random. What is then right is `jumping`: the reference whatever came before; or `consistent`: the sum of the token
before, right or wrong, and the digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Request
from kdrun.dataset.tokens import Ragged, TokenSplit
from kdrun.dataset.vocabulary import Symbols

LENGTH, BASE = 6, 10
EQUALS, COLON, MISSING = BASE, BASE + 1, BASE + 2
SYMBOLS = Symbols((*map(str, range(BASE)), "=", ":", "?"))
REPLACED = 0.3  # probability that a token of the completion is replaced, in practice rows that have the reference
Target = Literal["jumping", "consistent"]


@dataclass
class SumData:
    """`n_train` problems to train on and `n_test` further ones; with `practice`, the training rows of a policy's pre-training."""

    name: str = "sums"
    n_train: int = 20000
    n_test: int = 2000
    practice: bool = False
    target: Target = "jumping"
    unaided: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("n_train", "n_test"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.target not in get_args(Target):
            raise ValueError(f"target={self.target!r}: legal values {', '.join(get_args(Target))}")
        if not 0 <= self.unaided <= 1:
            raise ValueError(f"unaided={self.unaided}: legal range [0, 1]")

    def load(self) -> Data:
        """Draw the problems."""
        splits, first = {}, 0
        for part, size in (("train", self.n_train), ("test", self.n_test)):
            digits = rng.integers(rng.key(self.seed, "sums", part), BASE, torch.arange(size)[:, None], torch.arange(LENGTH))
            sums = digits.cumsum(1) % BASE
            ids = torch.arange(first, first + size)
            if part == "train" and self.practice:
                splits[part] = TokenSplit.of(Practice(digits, sums, self.target, self.unaided), ids)
            else:
                splits[part] = TokenSplit.of(_stored(digits, None, sums), ids, _stored(digits, sums, sums))
            first += size
        longest = 2 * LENGTH + 2 + LENGTH - 1
        return Data(self.name, SYMBOLS.names, (longest,), (), (), splits, first, vocabulary=SYMBOLS, reward=last_is_right)


def last_is_right(reference: list[int], written: list[int]) -> float:
    """1 if the last sum is right, else 0."""
    return float(bool(written) and len(written) == len(reference) and written[-1] == reference[-1])


def _prompt(digits: Tensor, hints: Tensor | None) -> Tensor:
    """Prompts [N, T], with the reference if there are hints [N, LENGTH]."""
    column = lambda token: torch.full((len(digits), 1), token)  # noqa: E731
    aided = [] if hints is None else [column(COLON), hints]
    return torch.cat([digits, *aided, column(EQUALS)], 1)


def _stored(digits: Tensor, hints: Tensor | None, sums: Tensor) -> Ragged:
    prompt = _prompt(digits, hints)
    N, L = len(prompt), prompt.shape[1] + LENGTH
    place = torch.arange(L, dtype=torch.int32).repeat(N)
    tokens = torch.cat([prompt, sums], 1).flatten().int()
    return Ragged(tokens, place >= prompt.shape[1], place, torch.arange(N + 1) * L)


@dataclass(eq=False)
class Practice:
    """Storage of practice rows: what a row is follows from (seed, id, view). Rows int64 [B, 3, T] as those of `Ragged`."""

    digits: Tensor  # [N, LENGTH]
    sums: Tensor  # [N, LENGTH]
    target: Target
    unaided: float
    prefetches: bool = False

    def __len__(self) -> int:
        return len(self.digits)

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        digits, sums = self.digits[request.positions], self.sums[request.positions]
        draw = lambda name, *more: rng.uniform(rng.key(request.seed, "practice", name), request.view[:, None], request.ids[:, None], *more)  # noqa: E731
        each = torch.arange(LENGTH)
        aided = draw("aided", torch.arange(1))[:, 0] >= self.unaided
        sparse = draw("sparse", torch.arange(1)) < 0.5  # half of the aided rows miss half of the reference
        hints = torch.where(sparse & (draw("missing", each) < 0.5), MISSING, sums)
        other = rng.integers(rng.key(request.seed, "practice", "other"), BASE, request.view[:, None], request.ids[:, None], each)
        written = torch.where((draw("replaced", each) < REPLACED) & aided[:, None], other, sums)
        before = torch.cat([torch.zeros(len(digits), 1, dtype=torch.int64), written[:, :-1]], 1)
        right = (before + digits) % BASE if self.target == "consistent" else sums
        right = torch.where(aided[:, None], right, sums)
        rows = [self._row(*parts) for parts in zip(digits, hints, written, right, aided.tolist(), strict=True)]
        longest = max(row.shape[1] for row in rows)
        return torch.stack([_padded(row, longest) for row in rows]).to(device)

    def _row(self, digits: Tensor, hints: Tensor, written: Tensor, right: Tensor, aided: bool) -> Tensor:
        prompt = _prompt(digits[None], hints[None] if aided else None)[0]
        inputs = torch.cat([prompt, written[:-1]])
        targets = torch.cat([torch.full((len(prompt) - 1,), -1), right])
        return torch.stack([inputs, targets, torch.arange(len(inputs))])

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, self.fetch(request, device)

    def digest(self, into: Any) -> None:
        into.update(self.digits.contiguous().numpy().data)
        into.update(f"practice {self.target} {self.unaided}".encode())


def _padded(row: Tensor, length: int) -> Tensor:
    """A row [3, T] to [3, length]: nothing scored, positions going on."""
    more = length - row.shape[1]
    tail = torch.stack([torch.zeros(more, dtype=torch.int64), torch.full((more,), -1), torch.arange(row.shape[1], length)])
    return torch.cat([row, tail], 1)
