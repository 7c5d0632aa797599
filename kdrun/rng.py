"""Randomness as a counter (law 3): every draw is a pure function of (seed, purpose, step or epoch, sample id, view).

Nothing here has state, so worker count, order, ranks and resume cannot change a draw, an augmented view can be
replayed, and a teacher's row can never belong to another view. The mixing function is the finaliser of SplitMix64
(Steele, Lea, Flood 2014), written in int64 tensor arithmetic, which wraps like the unsigned original.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def key(seed: int, *words: int | str) -> int:
    """A 63-bit key for one purpose: ``key(seed, "crop")``. The same words give the same key on every machine."""
    text = "\x1f".join(str(w) for w in (seed, *words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 (torch shifts arithmetically)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def bits(key: int, *counters: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """63 random bits for every element of the broadcast counters, as int64 >= 0."""
    x = torch.tensor(key, dtype=torch.int64, device=device)
    for counter in counters:
        c = counter if isinstance(counter, Tensor) else torch.tensor(counter, dtype=torch.int64, device=x.device)
        x = x.to(c.device) + (c.to(torch.int64) + 1) * _GOLDEN
        x = (x ^ _shift(x, 30)) * _MIX1
        x = (x ^ _shift(x, 27)) * _MIX2
        x = x ^ _shift(x, 31)
    return _shift(x, 1)


def uniform(key: int, *counters: Tensor | int) -> Tensor:
    """float32 in [0, 1) for every element of the broadcast counters (24 random bits, exact in float32)."""
    return _shift(bits(key, *counters), 39).to(torch.float32) / (1 << 24)


def normal(key: int, shape: tuple[int, ...], *counters: Tensor) -> Tensor:
    """float32 [B, *shape] of standard normals for counters [B], by Box and Muller's transform of two uniforms."""
    inner = torch.arange(math.prod(shape), device=counters[0].device)
    rows = [c[:, None] for c in counters]
    radius = torch.sqrt(-2 * torch.log1p(-uniform(key, *rows, 2 * inner)))  # 1 - u lies in (0, 1]
    return (radius * torch.cos(2 * math.pi * uniform(key, *rows, 2 * inner + 1))).view(-1, *shape)


def integers(key: int, high: int, *counters: Tensor | int) -> Tensor:
    """int64 in [0, high) for every element of the broadcast counters; bias below high / 2**63."""
    return bits(key, *counters) % high


def permutation(key: int, n: int, *counters: int) -> Tensor:
    """A permutation of range(n), int64 [n], drawn by (key, counters)."""
    return torch.argsort(bits(key, *counters, torch.arange(n)), stable=True)


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator at the start of the stream of this key, for library code that wants one."""
    return torch.Generator(device=device).manual_seed(key)
