"""A language model that looks at one conditioning token and the last two tokens: for worlds in which that is all there is to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16  # of each embedding


class WindowLM(nn.Module):
    """Logits of token i + 1 from x_0, x_{i-1} and x_i: three embeddings, one hidden layer, GELU.

    Args:
        num_classes: tokens V; what it says. Conditioning tokens have the ids V to V + contexts - 1.
        contexts: conditioning tokens, the first of every row.
        hidden: width of the hidden layer.

    Shapes: ids [B, T] -> [B, T, V].
    """

    def __init__(self, num_classes: int, contexts: int = 40, hidden: int = 16) -> None:
        super().__init__()
        if min(num_classes, contexts, hidden) < 1:
            raise ValueError(f"num_classes={num_classes}, contexts={contexts} and hidden={hidden} must be at least 1")
        self.vocabulary, self.ids = num_classes, num_classes + contexts
        self.context, self.before, self.last = (
            nn.Embedding(contexts, WIDTH),
            nn.Embedding(num_classes, WIDTH),
            nn.Embedding(num_classes, WIDTH),
        )
        self.body = nn.Linear(3 * WIDTH, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden_states(x))

    def hidden_states(self, x: Tensor) -> Tensor:
        """What the head reads, [B, T] -> [B, T, hidden]."""
        contexts = self.context((x[:, :1] - self.vocabulary).clamp(min=0)).expand(-1, x.shape[1], -1)
        words = x.clamp(max=self.vocabulary - 1)  # at the first two places there are not yet two tokens; nothing is learned there
        before = torch.cat([words[:, :1], words[:, :-1]], 1)
        return F.gelu(self.body(torch.cat([contexts, self.before(before), self.last(words)], -1)))
