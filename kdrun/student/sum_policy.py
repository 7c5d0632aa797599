"""A policy for running sums (dataset=sums): a small network on what it has to look at, as a language model on its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.dataset.sums import BASE, COLON, EQUALS, LENGTH, MISSING

WIDTH = 16  # of each embedding


class SumPolicy(nn.Module):
    """Logits of the next sum from four embeddings (this digit, its place, the sum before or a start, the reference's entry or none), one
    hidden layer, GELU.

    Shapes: ids [B, T] of prompts d_1 ... d_6 [: r_1 ... r_6] = and sums so far -> [B, T, num_classes]; only the first 10 are sums.
    """

    def __init__(self, num_classes: int, hidden: int = 128) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1")
        self.vocabulary = num_classes
        self.digit, self.place = nn.Embedding(BASE, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.before, self.hint = nn.Embedding(BASE + 1, WIDTH), nn.Embedding(BASE + 1, WIDTH)
        self.body = nn.Linear(4 * WIDTH, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden_states(x))

    def hidden_states(self, x: Tensor) -> Tensor:
        """What the head reads, [B, T] -> [B, T, hidden]."""
        B, T = x.shape
        start = (x == EQUALS).int().argmax(1)  # where the first sum is predicted
        n = (torch.arange(T, device=x.device) - start[:, None]).clamp(0, LENGTH - 1)  # which sum a position predicts
        digits = x[:, :LENGTH] if T >= LENGTH else F.pad(x, (0, LENGTH - T))
        aided = x[:, LENGTH : LENGTH + 1] == COLON if T > LENGTH else torch.zeros(B, 1, dtype=torch.bool, device=x.device)
        hints = x[:, LENGTH + 1 : 2 * LENGTH + 1]
        hints = F.pad(hints, (0, LENGTH - hints.shape[1])) if hints.shape[1] < LENGTH else hints
        none = ~aided | (hints == MISSING)
        hints = torch.where(none, BASE, hints).clamp(0, BASE)
        before = torch.where(x >= BASE, BASE, x)  # "=" is the start
        parts = [
            self.digit(digits.clamp(0, BASE - 1).gather(1, n)),
            self.place(n),
            self.before(before),
            self.hint(hints.gather(1, n)),
        ]
        return F.gelu(self.body(torch.cat(parts, -1)))
