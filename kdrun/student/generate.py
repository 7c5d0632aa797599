"""Completions of prompts by a language model, with randomness that is a counter.

Every token is drawn by one uniform number keyed by (key, sample id, its place in the completion), so the same weights write the same text
after a resume, on another rank, in another micro-batch. Models of transformers write through their own `generate` (cache, left padding);
any other network that says logits [B, T, V] is asked again for every token. Two networks can write together, each token drawn from a
mixture of what they say (MiniLLM's teacher-mixed sampling, ICLR 2024, arXiv 2306.08543, Sec. 2.2). So many rows are written at once as
memory allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun import rng
from kdrun.losses.token import log_mixture
from kdrun.student.taps import untouched

LOGITS_AT_ONCE = 2**24  # numbers of what is said at once
KEPT_AT_ONCE = 2**31  # numbers of keys and values that are held at once: 8 GiB in float32

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


class Mixed(NamedTuple):
    """A second network that writes along."""

    network: nn.Module
    weight: float  # a of a p + (1 - a) q, p what this network says, in [0, 1]


class _Draw:
    """The choice of one token for every row, by counters; collects what it chose."""

    def __init__(self, sampling: Sampling, key: int, ids: Tensor) -> None:
        self.sampling, self.key, self.ids = sampling, key, ids
        self.log_probs: list[Tensor] = []

    def choose(self, sofar: Tensor, logits: Tensor) -> Tensor:
        """Token ids [B] from logits [B, V]."""
        for processor in self.sampling.processors:
            logits = processor(sofar, logits)
        return self.take(self.sampling.log_probs(logits))

    def take(self, told: Tensor) -> Tensor:
        """Token ids [B] from log-probabilities [B, V]."""
        u = rng.uniform(self.key, self.ids, len(self.log_probs)).to(told.device)
        reached = told.exp().cumsum(-1)
        # Below the whole mass, which rounding leaves a little off 1: so the last token is one that can be drawn.
        chosen = (reached <= u[:, None].double() * reached[:, -1:]).sum(-1)
        self.log_probs.append(told.gather(-1, chosen[:, None])[:, 0])
        return chosen


def complete(
    network: nn.Module,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    key: int,
    ids: Tensor,
    pad: int,
    device: torch.device,
    mixed: Mixed | None = None,
) -> Completions:
    """Completions of prompts, each a row of token ids [T_i] with at least one token.

    `key` and the sample ids [B] decide every draw. The networks are in evaluation mode meanwhile, and no gradient is kept. `mixed` writes
    along: the temperature, top_k and top_p of `sampling` are then applied to both before they are mixed.
    """
    networks = [network] if mixed is None else [network, mixed.network]
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    at_once = min(_rows_at_once(each, longest) for each in networks)
    parts = []
    with untouched(network, device), nullcontext() if mixed is None else untouched(mixed.network, device), torch.inference_mode():
        for begin in range(0, len(prompts), at_once):
            rows = slice(begin, begin + at_once)
            draw, moved = _Draw(sampling, key, ids[rows]), [p.to(device) for p in prompts[rows]]
            if mixed is not None:
                tokens = _by_mixing([_reader(each, moved, sampling.max_new_tokens, pad) for each in networks], mixed.weight, draw)
            else:
                write = _by_transformers if hasattr(network, "generate") else _by_asking
                tokens = write(network, moved, draw, pad)
            parts.append((tokens.clone(), torch.stack(draw.log_probs, 1).clone()))
    return ended(_beside([tokens for tokens, _ in parts], pad), _beside([said for _, said in parts], 0.0), sampling.stop, pad)


def _rows_at_once(network: Any, longest: int) -> int:
    """How many rows of at most `longest` tokens may be written together. Only of the last place logits are made where there is a cache."""
    if not hasattr(network, "generate"):
        return max(1, LOGITS_AT_ONCE // (network.vocabulary * longest))
    shape: Any = network.config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or getattr(shape, "num_attention_heads", None) or 0
    width = getattr(shape, "head_dim", None) or shape.hidden_size // max(1, heads)
    kept = 2 * shape.num_hidden_layers * heads * width * longest
    return max(1, min(LOGITS_AT_ONCE // network.vocabulary, KEPT_AT_ONCE // max(1, kept)))


def _beside(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Rows [B_i, L_i] under each other, filled up to the longest."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])


def ended(tokens: Tensor, log_probs: Tensor, stop: Sequence[int], pad: int, written: Tensor | None = None) -> Completions:
    """Tokens [B, L], of which `written` [B] (None: all) were written, without what comes after the first stop token."""
    L = tokens.shape[1]
    stops = torch.isin(tokens, torch.tensor(stop, dtype=tokens.dtype, device=tokens.device))
    lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, L)
    if written is not None:
        lengths = torch.minimum(lengths, written)
    beyond = torch.arange(L, device=tokens.device) >= lengths[:, None]
    longest = int(lengths.max())
    return Completions(tokens.masked_fill(beyond, pad)[:, :longest], lengths, log_probs.masked_fill(beyond, 0.0)[:, :longest])


class _Reader(Protocol):
    """A network that has read the prompts and what was written so far."""

    def next(self) -> Tensor:
        """What it says of the next token, logits [B, V]."""

    def put(self, token: Tensor) -> None:
        """The tokens [B] that came."""


class _Asked:
    """Any causal network: rows are padded on the right, where what is asked does not see it, and read anew for every token."""

    def __init__(self, network: Any, prompts: Sequence[Tensor], new: int, pad: int) -> None:
        self.network, self.written = network, 0
        self.lengths = torch.tensor([len(p) for p in prompts], device=prompts[0].device)
        self.row = torch.full((len(prompts), int(self.lengths.max()) + new), pad, dtype=torch.int64, device=prompts[0].device)
        for i, prompt in enumerate(prompts):
            self.row[i, : len(prompt)] = prompt
        self.each, self.widest = torch.arange(len(prompts), device=self.row.device), int(self.lengths.max())

    @property
    def so_far(self) -> Tensor:
        return self.row[:, : self.widest + self.written]

    def next(self) -> Tensor:
        said = self.network(self.so_far)
        logits: Tensor = getattr(said, "logits", said)
        return logits[self.each, self.lengths + self.written - 1, : self.network.vocabulary]

    def put(self, token: Tensor) -> None:
        self.row[self.each, self.lengths + self.written] = token
        self.written += 1


class _Cached:
    """A model of transformers with a cache of keys and values: rows are padded on the left."""

    def __init__(self, network: Any, prompts: Sequence[Tensor], pad: int) -> None:
        self.network, self.cache = network, None
        self.unread, self.seen = left_padded(prompts, pad)
        self.takes = inspect.signature(network.forward).parameters

    def next(self) -> Tensor:
        width = self.unread.shape[1]
        positions = (self.seen.cumsum(1) - 1).clamp(min=0)[:, -width:]
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in wanted.items() if name in self.takes}
        said = self.network(self.unread, attention_mask=self.seen, past_key_values=self.cache, use_cache=True, **given)
        self.cache = said.past_key_values
        return said.logits[:, -1, : self.network.vocabulary]

    def put(self, token: Tensor) -> None:
        self.unread = token[:, None]
        self.seen = F.pad(self.seen, (0, 1), value=1)


def _reader(network: nn.Module, prompts: Sequence[Tensor], new: int, pad: int) -> _Reader:
    # Recurrent models hold their past in another form, each in its own: they are asked anew.
    cached = hasattr(network, "generate") and "past_key_values" in inspect.signature(network.forward).parameters
    return _Cached(network, prompts, pad) if cached else _Asked(network, prompts, new, pad)


def _by_asking(network: nn.Module, prompts: Sequence[Tensor], draw: _Draw, pad: int) -> Tensor:
    reader = _Asked(network, prompts, draw.sampling.max_new_tokens, pad)
    return _written([reader], lambda: draw.choose(reader.so_far, reader.next()), draw.sampling)


def _by_mixing(readers: Sequence[_Reader], weight: float, draw: _Draw) -> Tensor:
    """The second of two readers has that weight."""
    say = lambda: (draw.sampling.log_probs(reader.next()) for reader in readers)  # noqa: E731

    def choose() -> Tensor:
        own, other = say()
        return draw.take(log_mixture(other, own, weight))

    return _written(readers, choose, draw.sampling)


def _written(readers: Sequence[_Reader], choose: Callable[[], Tensor], sampling: Sampling) -> Tensor:
    """Token after token until every row has ended, [B, L]."""
    chosen: list[Tensor] = []
    over: Tensor | bool = False
    for _ in range(sampling.max_new_tokens):
        token = choose()
        for reader in readers:
            reader.put(token)
        chosen.append(token)
        over = over | torch.isin(token, torch.tensor(sampling.stop, dtype=torch.int64, device=token.device))
        if bool(over.all()):
            break
    return torch.stack(chosen, 1)


def left_padded(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """(rows [B, T], 1 where there is a prompt and 0 where there is padding [B, T])."""
    widest, device = max(map(len, prompts)), prompts[0].device
    row = torch.full((len(prompts), widest), pad, dtype=torch.int64, device=device)
    seen = torch.zeros_like(row)
    for i, prompt in enumerate(prompts):
        row[i, widest - len(prompt) :] = prompt
        seen[i, widest - len(prompt) :] = 1
    return row, seen


def _by_transformers(network: Any, prompts: Sequence[Tensor], draw: _Draw, pad: int) -> Tensor:
    """Through the model's own `generate`: rows are padded on the left, and its choice is made for it."""
    row, seen = left_padded(prompts, pad)

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
        return network.generate(input_ids=row, attention_mask=seen, logits_processor=[chosen])[:, row.shape[1] :]
    finally:
        network.generation_config = own
