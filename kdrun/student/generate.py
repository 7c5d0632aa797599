"""Completions of prompts by a language model, with randomness that is a counter.

Every token is drawn by one uniform number keyed by (key, sample id, its place in the completion), so the same weights write the same text
after a resume, on another rank, in another micro-batch. Models of transformers write through their own `generate` (cache, left padding);
any other network that says logits [B, T, V] is asked again for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun import rng
from kdrun.student.taps import untouched

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids [B, T], logits [B, V]) -> logits [B, V]: transformers' logits processors


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises ValueError for a field outside its range."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[int, ...] = ()  # a completion ends with the first of these
    processors: tuple[Processor, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(f"max_new_tokens={self.max_new_tokens} and top_k={self.top_k} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature}: legal range [0, inf); top_p={self.top_p}: legal range (0, 1]")

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of the distribution that tokens are drawn from, float64 [B, V] -> [B, V]; -inf for what is never drawn."""
        logits = logits.double()
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[..., -1:], -torch.inf)
        if self.top_p < 1:
            # A large vocabulary takes long to sort, and top_k has left few of it.
            ordered, order = logits.softmax(-1).topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the first token that reaches top_p is kept
            logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, beyond), -torch.inf)
        return F.log_softmax(logits, -1)


class Completions(NamedTuple):
    """What was written, padded on the right."""

    tokens: Tensor  # [B, L] int64
    lengths: Tensor  # [B] int64, the stop token included
    log_probs: Tensor  # [B, L] float64, of each token under the distribution that it was drawn from; 0 beyond the length


class _Draw:
    """The choice of one token for every row, by counters; collects what it chose."""

    def __init__(self, sampling: Sampling, key: int, ids: Tensor) -> None:
        self.sampling, self.key, self.ids = sampling, key, ids
        self.log_probs: list[Tensor] = []

    def choose(self, sofar: Tensor, logits: Tensor) -> Tensor:
        """Token ids [B] from logits [B, V]."""
        for processor in self.sampling.processors:
            logits = processor(sofar, logits)
        told = self.sampling.log_probs(logits)
        u = rng.uniform(self.key, self.ids, len(self.log_probs)).to(told.device)
        reached = told.exp().cumsum(-1)
        # Below the whole mass, which rounding leaves a little off 1: so the last token is one that can be drawn.
        chosen = (reached <= u[:, None].double() * reached[:, -1:]).sum(-1)
        self.log_probs.append(told.gather(-1, chosen[:, None])[:, 0])
        return chosen


def complete(
    network: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, key: int, ids: Tensor, pad: int, device: torch.device
) -> Completions:
    """Completions of prompts, each a row of token ids [T_i] with at least one token.

    `key` and the sample ids [B] decide every draw. The network is in evaluation mode meanwhile, and no gradient is kept.
    """
    draw = _Draw(sampling, key, ids)
    with untouched(network, device), torch.inference_mode():
        write = _by_transformers if hasattr(network, "generate") else _by_asking
        tokens = write(network, [p.to(device) for p in prompts], draw, pad)
    return _ended(tokens.clone(), torch.stack(draw.log_probs, 1).clone(), sampling.stop, pad)


def _ended(tokens: Tensor, log_probs: Tensor, stop: Sequence[int], pad: int) -> Completions:
    """What comes after the first stop token is taken away."""
    L = tokens.shape[1]
    stops = torch.isin(tokens, torch.tensor(stop, dtype=tokens.dtype, device=tokens.device))
    lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, L)
    beyond = torch.arange(L, device=tokens.device) >= lengths[:, None]
    longest = int(lengths.max())
    return Completions(tokens.masked_fill(beyond, pad)[:, :longest], lengths, log_probs.masked_fill(beyond, 0.0)[:, :longest])


def _by_asking(network: nn.Module, prompts: Sequence[Tensor], draw: _Draw, pad: int) -> Tensor:
    """Any causal network: rows are padded on the right, where what is asked does not see it."""
    new, lengths = draw.sampling.max_new_tokens, torch.tensor([len(p) for p in prompts], device=prompts[0].device)
    row = torch.full((len(prompts), int(lengths.max()) + new), pad, dtype=torch.int64, device=prompts[0].device)
    for i, prompt in enumerate(prompts):
        row[i, : len(prompt)] = prompt
    each, over = torch.arange(len(prompts), device=row.device), torch.zeros(len(prompts), dtype=torch.bool, device=row.device)
    chosen: list[Tensor] = []
    stop = torch.tensor(draw.sampling.stop, dtype=torch.int64, device=row.device)
    for step in range(new):
        so_far = row[:, : int(lengths.max()) + step]
        logits = network(so_far)[each, lengths + step - 1, : network.vocabulary]
        token = draw.choose(so_far, logits)
        row[each, lengths + step] = token
        chosen.append(token)
        over |= torch.isin(token, stop)
        if bool(over.all()):
            break
    return torch.stack(chosen, 1)


def _by_transformers(network: Any, prompts: Sequence[Tensor], draw: _Draw, pad: int) -> Tensor:
    """Through the model's own `generate`: rows are padded on the left, and its choice is made for it."""
    widest, device = max(map(len, prompts)), prompts[0].device
    row = torch.full((len(prompts), widest), pad, dtype=torch.int64, device=device)
    seen = torch.zeros_like(row)
    for i, prompt in enumerate(prompts):
        row[i, widest - len(prompt) :] = prompt
        seen[i, widest - len(prompt) :] = 1

    def chosen(ids: Tensor, scores: Tensor) -> Tensor:
        token = draw.choose(ids, scores[:, : network.vocabulary])
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    own = network.generation_config
    # Many published models bring settings of their own (penalties, suppressed tokens, further stops), which would change what is drawn.
    network.generation_config = type(own)(
        do_sample=False,
        num_beams=1,
        max_new_tokens=draw.sampling.max_new_tokens,
        eos_token_id=list(draw.sampling.stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    try:
        return network.generate(input_ids=row, attention_mask=seen, logits_processor=[chosen])[:, widest:]
    finally:
        network.generation_config = own
