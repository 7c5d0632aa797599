"""Topic texts: a Markov text of second order whose next-token distribution, and so its entropy, is known at every position. Ours.

    z[topic, a, b] = 1.8 tanh([e1[topic], e2[a], e3[b]] W1) W2 + 0.5 R[topic, a, b],   next token ~ softmax(z)

after tokens a, b: smooth structure that a small network can learn, and a part that must be learned by heart. Embeddings ~ N(0, 1) of
6, W1 = 1.5 N(0, 1) / sqrt(18) with 64 hidden units, W2 = 2 N(0, 1) / 8, R ~ N(0, 1). A row is its topic (token 40 and up), two uniform
tokens and 12 drawn ones, which are scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import Ragged, TokenSplit
from kdrun.dataset.vocabulary import Symbols

EMBEDDING, HIDDEN = 6, 64
CURVED, OWN = 1.8, 0.5
PROMPT = 3  # the topic and two tokens


@dataclass
class TopicData:
    """`n_train` rows to train on, `n_test` to test on, `n_validation` for a validation split. Batches carry "truth_logits" float32
    [B, T, tokens]: the exact distribution of every scored token."""

    name: str = "topics"
    topics: int = 40
    tokens: int = 40
    length: int = 12
    n_train: int = 6000
    n_test: int = 1500
    n_validation: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, low in (("topics", 1), ("tokens", 2), ("length", 1), ("n_train", 1), ("n_test", 1), ("n_validation", 0)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")

    def logits(self) -> Tensor:
        """z, float32 [topics, tokens, tokens, tokens] by topic, token before last, last token, next token."""
        source = rng.generator(rng.key(self.seed, "topics", "world"))
        normal = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
        e1, e2, e3 = normal(self.topics, EMBEDDING), normal(self.tokens, EMBEDDING), normal(self.tokens, EMBEDDING)
        w1 = 1.5 * normal(3 * EMBEDDING, HIDDEN) / (3 * EMBEDDING) ** 0.5
        w2 = 2 * normal(HIDDEN, self.tokens) / HIDDEN**0.5
        parts = w1.split(EMBEDDING)
        inner = (e1 @ parts[0])[:, None, None] + (e2 @ parts[1])[:, None] + e3 @ parts[2]
        return (CURVED * torch.tanh(inner) @ w2 + OWN * normal(self.topics, self.tokens, self.tokens, self.tokens)).float()

    def load(self) -> Data:
        """Draw the rows."""
        world, splits, first = self.logits(), {}, 0
        for part, size in (("train", self.n_train), ("validation", self.n_validation), ("test", self.n_test)):
            if size:
                rows, truth = self._draw(world, part, size)
                splits[part] = TokenSplit.of(_stored(rows), torch.arange(first, first + size), truth_logits=truth)
                first += size
        names = tuple(f"w{i}" for i in range(self.tokens))
        vocabulary = Symbols((*names, *(f"topic{i}" for i in range(self.topics))))

        def said(ids: Tensor) -> Tensor:
            ids = ids.cpu()
            words = ids.clamp(max=self.tokens - 1)  # before its third token a row has no two; nothing is drawn there
            before = torch.cat([words[:, :1], words[:, :-1]], 1)
            return world[(ids[:, :1] - self.tokens).clamp(min=0).expand_as(ids), before, words]

        return Data(self.name, names, (PROMPT + self.length - 1,), (), (), splits, first, vocabulary=vocabulary, world=said)

    def _draw(self, world: Tensor, part: str, size: int) -> tuple[Tensor, Tensor]:
        """(rows int64 [N, PROMPT + length], truth logits float32 [N, PROMPT + length - 1, tokens])."""
        ids, key = torch.arange(size), rng.key(self.seed, "topics", part)
        topic = rng.integers(rng.key(key, "topic"), self.topics, ids)
        row = [topic, *rng.integers(rng.key(key, "prompt"), self.tokens, ids[:, None], torch.arange(2)).unbind(1)]
        known = [torch.zeros(size, self.tokens)] * (PROMPT - 1)
        draws = rng.uniform(rng.key(key, "next"), ids[:, None], torch.arange(self.length))
        for i in range(self.length):
            known.append(world[topic, row[-2], row[-1]])
            reached = known[-1].softmax(-1).cumsum(-1) < draws[:, i : i + 1]
            row.append(reached.sum(-1).clamp(max=self.tokens - 1))
        row[0] = topic + self.tokens
        return torch.stack(row, 1), torch.stack(known, 1)


def _stored(rows: Tensor) -> Ragged:
    """Rows of equal length [N, L], scored after the prompt."""
    N, L = rows.shape
    place = torch.arange(L, dtype=torch.int32).repeat(N)
    return Ragged(rows.flatten().int(), place >= PROMPT, place, torch.arange(N + 1) * L)
