"""A critic of texts: the body of a language model, without its output layer, and a head on the last token's hidden state.

It says logits of (wrong, right) as (0, z), so that its softmax is sigmoid(z) and cross-entropy on it the binary cross-entropy of z.
Symbolic Knowledge Distillation (NAACL 2022, arXiv 2110.07178) begins with a pre-trained model and puts a hidden layer into the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.config.schema import TEACHER_KEYS
from kdrun.student.build import build
from kdrun.student.language import head_of

LAST = "last"  # row of extra [B]: where each text's last token is


class TextCritic(nn.Module):
    """Ids [B, T], padded on the right, and `last` [B] -> logits [B, 2]. The body is causal, so padding changes nothing."""

    takes = (LAST,)

    def __init__(self, model: Any, hidden: int | None = None, dropout: float = 0.0, prior: float = 0.5) -> None:
        super().__init__()
        width = head_of(model)[0].shape[1]
        self.body: Any = body_of(model)
        layers = [] if hidden is None else [nn.Dropout(dropout), nn.Linear(width, hidden), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden or width, 1))
        nn.init.constant_(self.head[-1].bias, log_odds(prior))  # type: ignore[arg-type]

    def example(self, rows: int) -> dict[str, Tensor]:
        """Stand-ins for tracing shapes."""
        return {LAST: torch.zeros(rows, dtype=torch.int64)}

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        ids = x.long()  # shapes are traced with zeros of the weights' type
        hidden = self.body.hidden_states(ids) if hasattr(self.body, "hidden_states") else self.body(ids, use_cache=False)[0]
        z = self.head(hidden[torch.arange(len(ids), device=ids.device), last])[:, 0]
        return torch.stack([torch.zeros_like(z), z], 1)

    def begin_as(self, model: nn.Module) -> None:
        """Take a language model's weights, all but its output layer."""
        self.body.load_state_dict(body_of(model).state_dict())


def body_of(model: Any) -> nn.Module:
    """A language model without its output layer. One of kdrun's own keeps it, unused and untrained."""
    return model if hasattr(model, "hidden_states") else model.base_model


def log_odds(prior: float) -> float:
    """The bias with which a head of zero weights says `prior`. Raises ValueError outside (0, 1)."""
    if not 0 < prior < 1:
        raise ValueError(f"prior={prior}: legal range (0, 1)")
    return math.log(prior / (1 - prior))


def text_critic(
    num_classes: int, vocabulary: int, model: Mapping[str, Any], hidden: int | None = None, dropout: float = 0.0, prior: float = 0.5
) -> nn.Module:
    """A critic with the body of the language model that the node `model` describes, its weights fresh (see `TextCritic.begin_as`).

    Args:
        vocabulary: tokens that it reads.
        hidden: width of a hidden layer of GELU in its head; None: the head is one matrix.
        dropout: before every matrix of the head.
        prior: what a head of zero weights says.
    """
    if num_classes != 2:
        raise ValueError(f"num_classes={num_classes}: a critic knows wrong and right")
    node = {**model, "pretrained": False} if "pretrained" in model else dict(model)
    return TextCritic(build(node, vocabulary, (1,), reserved=TEACHER_KEYS, key="teacher"), hidden, dropout, prior)
