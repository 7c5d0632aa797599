"""Written texts that are read again: the replay buffer of DistiLLM and its threshold (Ko et al., ICML 2024, arXiv 2402.03898).

    r ~ U(0, 1),  now = phi (1 - step / total)
    r < now, or r < phi and the buffer is not full     written afresh, and kept
    otherwise r < phi                                  drawn from the buffer, without replacement
    otherwise                                          the data's own

phi rises by `step` when the validation loss is `eps` or more above the last one that raised it, the first of them measured before training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdrun import rng

Kind = Literal["fresh", "replayed", "given"]


class Text(NamedTuple):
    """One completion as it was when it was written."""

    row: int  # of the split: whose prompt it completes
    view: int
    tokens: list[int]
    log_probs: list[float]  # of each token under what it was drawn from, as float32
    reward: float  # 0 where nothing judges
    advantage: float  # against the other completions of its prompt, written in the same step


@dataclass(eq=False)
class Replay:
    """The buffer and its threshold; the oldest texts make room. All ranks hold the same."""

    capacity: int
    phi: float
    step: float
    eps: float
    previous: float | None = None  # the validation loss that phi was last raised at, or the first one
    texts: deque[Text] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = deque(maxlen=self.capacity)

    def kind(self, r: float, done: float) -> Kind:
        """Where a step's texts come from, by its draw `r` in [0, 1) and the share of the training that is done."""
        full = len(self.texts) == self.capacity
        if r < self.phi * (1 - done) or (r < self.phi and not full):
            return "fresh"
        return "replayed" if r < self.phi else "given"

    def drawn(self, count: int, key: int, step: int) -> list[Text]:
        """`count` different texts of the buffer."""
        return [self.texts[i] for i in rng.permutation(key, len(self.texts), step)[:count].tolist()]

    def hear(self, loss: float) -> None:
        """A validation loss."""
        if self.previous is None:
            self.previous = loss
        elif loss >= self.previous + self.eps:
            self.phi, self.previous = min(1.0, self.phi + self.step), loss

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "previous": self.previous, "texts": _packed(self.texts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.phi, self.previous = state["phi"], state["previous"]
        self.texts = deque(_unpacked(state["texts"]), maxlen=self.capacity)


def _packed(texts: Sequence[Text]) -> dict[str, Tensor]:
    """As a few tensors, for a checkpoint."""
    each = lambda name, dtype: torch.tensor([getattr(text, name) for text in texts], dtype=dtype)  # noqa: E731
    every = lambda name, dtype: torch.tensor([value for text in texts for value in getattr(text, name)], dtype=dtype)  # noqa: E731
    return {
        "rows": each("row", torch.int64),
        "views": each("view", torch.int64),
        "lengths": torch.tensor([len(text.tokens) for text in texts], dtype=torch.int64),
        "tokens": every("tokens", torch.int64),
        "log_probs": every("log_probs", torch.float32),
        "rewards": each("reward", torch.float32),
        "advantages": each("advantage", torch.float32),
    }


def _unpacked(state: Mapping[str, Tensor]) -> list[Text]:
    sizes = state["lengths"].tolist()
    tokens, log_probs = ([part.tolist() for part in state[name].split(sizes)] if sizes else [] for name in ("tokens", "log_probs"))
    alone = (state[name].tolist() for name in ("rewards", "advantages"))
    return [Text(*parts) for parts in zip(state["rows"].tolist(), state["views"].tolist(), tokens, log_probs, *alone, strict=True)]
