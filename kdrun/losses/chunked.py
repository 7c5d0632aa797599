"""Losses on a large vocabulary without ever holding its logits: head and divergence together, a chunk of tokens at a time.

N tokens, D hidden features, V ids. The [N, V] logits of student and teacher are what does not fit: 8 x 2048 tokens of
128256 ids take 7.8 GiB in float32, per model. Here a chunk of C tokens is projected, compared and differentiated at once,
in the FORWARD pass; what is kept is the gradient of the hidden states, of the head's weight and of its bias. The scheme is
that of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989), but for any row loss: autograd takes the derivative by
the logits, per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kdrun.losses.token import token_cross_entropy

Targets = Callable[[Tensor], tuple[Tensor, ...]]  # token indices [C] int64 -> what the row loss compares them with, [C, ...] each
# (student logits [C, V], *targets) -> [C], each row by itself; or ([C], what is to be watched beside it [C], without gradient)
RowLoss = Callable[..., Any]


# Every chunk reads and writes the gradient of the whole head once. Of 1,024 tokens, 151,936 ids and 512 features, on one busy CPU core,
# chunks of 16 took 35 s, of 64 and of 256 18 s, all at once 25 s.
SMALLEST_CHUNK = 64


class Summed(NamedTuple):
    """A weighted sum over tokens, and the tokens' own losses."""

    sum: Tensor  # scalar, float32 or wider, with gradient
    rows: Tensor  # [N] unweighted, detached, 0 where the weight is 0
    watched: Tensor | None = None  # [N] what the loss says beside its values, 0 where the weight is 0


def chunked_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    loss: RowLoss,
    row_weights: Tensor,
    chunk: int | None = None,
    recompute: bool = False,
) -> Summed:
    """sum_n row_weights_n * loss(hidden_n weight^T + bias, *targets(n)), `chunk` tokens at a time.

    hidden [N, D], weight [V, D], bias [V] or None, row_weights [N] (no gradient). Rows of weight 0 are neither projected
    nor shown to `targets` and `loss`. Only hidden, weight and bias get a gradient; a weight that is tied to the embedding
    gets both. Without a gradient to give, nothing is differentiated. `chunk`: by `chunk_size` if None.

    `recompute` differentiates in the backward pass instead, projecting every chunk a second time: slower, but anything that
    `loss` closes over gets its gradient too.
    """
    scored = row_weights.detach().nonzero()[:, 0]
    chunks = scored.split(chunk or chunk_size(len(scored), *weight.shape))
    if recompute:
        return _recomputed(hidden, weight, bias, targets, loss, row_weights, chunks)
    return Summed(*_Fused.apply(hidden, weight, bias, targets, loss, row_weights, chunks, torch.is_grad_enabled()))


def chunk_size(rows: int, vocabulary: int, width: int) -> int:
    """Tokens of a chunk whose logits take about the memory of all hidden states, a power of 2, and not fewer than `SMALLEST_CHUNK`.

    next_pow2(ceil(N / ceil(V / D))): public code of Liger-Kernel (fused linear cross-entropy).
    """
    share = math.ceil(rows / math.ceil(vocabulary / width))
    return max(1 << max(share - 1, 0).bit_length(), SMALLEST_CHUNK)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Targets:
    """The logits of a teacher given by its hidden states [N, D'], its head [V, D'] and bias [V]."""
    return lambda tokens: (F.linear(hidden[tokens], weight, bias),)


def stored(*tensors: Tensor) -> Targets:
    """Rows of tensors [N, ...]: labels, or the cached ids and log-probabilities that `kdrun.losses.sparse` takes."""
    return lambda tokens: tuple(t[tokens] for t in tensors)


def together(*parts: Targets) -> Targets:
    """All that several parts give, in order."""
    return lambda tokens: tuple(t for part in parts for t in part(tokens))


def split_watched(said: Any) -> tuple[Tensor, Tensor | None]:
    """(values, what is watched beside them or None) of what a row loss says."""
    return said if isinstance(said, tuple) else (said, None)


def with_labels(loss: RowLoss, weight: float) -> RowLoss:
    """(1 - w) CE + w loss, whose LAST target is the labels [C] (-100: no label), in one pass over the logits."""
    return lambda logits, *targets: (1 - weight) * token_cross_entropy(logits, targets[-1]) + weight * loss(logits, *targets[:-1])


class _Fused(torch.autograd.Function):
    """Gradients are taken in the forward pass, where the chunk's logits are; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        loss: RowLoss,
        row_weights: Tensor,
        chunks: tuple[Tensor, ...],
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        wanted = [differentiate and need for need in ctx.needs_input_grad[:3]]
        rows, watched = _wide_zeros(hidden[:, 0]), None
        # Sums over tokens stay wide until they are scaled: in half precision they would stall (bfloat16) or overflow (float16).
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = _wide_zeros(weight) if wanted[1] else None
        grad_bias = _wide_zeros(bias) if wanted[2] and bias is not None else None
        for tokens in chunks:
            given, seen = hidden[tokens], targets(tokens)
            logits = F.linear(given, weight, bias).requires_grad_(any(wanted))
            with torch.set_grad_enabled(any(wanted)):
                values, beside = split_watched(loss(logits, *seen))
            rows[tokens] = values.detach().to(rows.dtype)
            if beside is not None:
                watched = torch.zeros_like(rows) if watched is None else watched
                watched[tokens] = beside.to(rows.dtype)
            if not any(wanted):
                continue
            (slope,) = torch.autograd.grad(values, logits, row_weights[tokens].to(values.dtype))
            if grad_hidden is not None:
                grad_hidden[tokens] = (slope @ weight).to(grad_hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, slope.t(), given)
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=grad_bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(rows, *(() if watched is None else (watched,)))
        return (rows * row_weights).sum(), rows, watched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else (grad_sum * grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None, None, None)


def _wide_zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape in at least float32."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, without a second [V, D] where the precisions agree."""
    if into.dtype == a.dtype == b.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b


def _recomputed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    loss: RowLoss,
    row_weights: Tensor,
    chunks: tuple[Tensor, ...],
) -> Summed:
    """`chunked_sum` with each chunk's logits thrown away and made again in the backward pass."""

    def values_of(given: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            seen = targets(tokens)
        return split_watched(loss(F.linear(given, weight, bias), *seen))[0]

    # Gathered once: the gradient of an index is as large as all hidden states, per chunk.
    given = hidden[torch.cat(chunks)].split([len(tokens) for tokens in chunks])
    values = torch.cat(
        [checkpoint(values_of, g, weight, bias, tokens, use_reentrant=False) for g, tokens in zip(given, chunks, strict=True)]
    )
    rows = values.new_zeros(len(hidden)).index_put((torch.cat(chunks),), values)
    return Summed((rows * row_weights.detach()).sum(), rows.detach())
