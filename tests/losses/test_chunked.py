from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrun.losses.chunked import Targets, chunk_size, chunked_sum, head, stored, together, with_labels
from kdrun.losses.sparse import renormalised, rest_bucket, sampled_cross_entropy, truncated, zero_missing
from kdrun.losses.token import (
    IGNORED,
    adaptive_kl,
    entry_clipped,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    token_cross_entropy,
    total_variation,
)

N, V, D, K = 9, 11, 5, 3
MASKED = [2, 8]

DENSE: dict[str, Callable[..., Tensor]] = {
    "forward_kl": partial(forward_kl, temperature=2.0),
    "reverse_kl": partial(reverse_kl, temperature=0.7),
    "jsd": partial(generalised_jsd, beta=0.3),
    "total_variation": total_variation,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "entry_clipped": partial(entry_clipped, cap=0.05),
    "entry_clipped_jsd": partial(entry_clipped, cap=0.05, beta=0.5),
    "taid_kl": partial(taid, t=0.4),
    "taid_ce": partial(taid, t=0.4, value="ce"),
}
SPARSE: dict[str, Callable[..., Tensor]] = {
    "renormalised": renormalised,
    "zero_missing": zero_missing,
    "rest_bucket": rest_bucket,
    "truncated": truncated,
    "sampled": lambda logits, ids, log_probs: sampled_cross_entropy(logits, ids, log_probs.exp()),
}


class Case(NamedTuple):
    """A student's head over a teacher's, N tokens of which some are masked."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: Tensor  # [N, V] logits
    parts: tuple[Tensor, Tensor, Tensor]  # what makes them
    labels: Tensor
    row_weights: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def case(rows: int = N, vocabulary: int = V, width: int = D, dtype: torch.dtype = torch.float64) -> Case:
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    parts = (normal(rows, 7), normal(vocabulary, 7), normal(vocabulary))
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[::4] = IGNORED
    row_weights = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5
    row_weights[[m for m in MASKED if m < rows]] = 0
    leaves = [normal(rows, width).requires_grad_(), normal(vocabulary, width).requires_grad_(), normal(vocabulary).requires_grad_()]
    return Case(leaves[0], leaves[1], leaves[2], F.linear(*parts), parts, labels, row_weights)


def setting(name: str, c: Case) -> tuple[Callable[..., Tensor], Targets, tuple[Tensor, ...]]:
    """A loss, where its targets come from by chunk, and the targets all at once."""
    if name == "ce":
        return token_cross_entropy, stored(c.labels), (c.labels,)
    if name.endswith("+ce"):
        loss, targets, dense = setting(name.removesuffix("+ce"), c)
        return with_labels(loss, 0.3), together(targets, stored(c.labels)), (*dense, c.labels)
    if name in DENSE:
        return DENSE[name], head(*c.parts), (c.teacher,)
    log_probs, ids = c.teacher.log_softmax(-1).topk(K, -1)
    return SPARSE[name], stored(ids, log_probs), (ids, log_probs)


EVERY = pytest.mark.parametrize("name", [*DENSE, *SPARSE, "ce", "forward_kl+ce", "jsd+ce", "truncated+ce"])
EITHER_WAY = pytest.mark.parametrize("recompute", [False, True])


class LargestTensor(TorchDispatchMode):
    """Watches the number of elements of everything that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@EVERY
def test_value_and_gradients_are_those_of_all_logits_at_once(name: str) -> None:
    c = case()
    loss, targets, dense = setting(name, c)
    rows = loss(F.linear(*c.leaves), *dense)
    expected = (rows * c.row_weights).sum()
    exact = torch.autograd.grad(expected, c.leaves, retain_graph=True)
    for chunk, recompute in ((1, False), (3, False), (N, False), (None, False), (3, True), (N, True)):
        found = chunked_sum(*c.leaves, targets, loss, c.row_weights, chunk, recompute)
        torch.testing.assert_close(found.sum, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.rows, rows.detach().masked_fill(c.row_weights == 0, 0.0), rtol=1e-12, atol=1e-12)
        assert not found.rows.requires_grad
        slopes = torch.autograd.grad(found.sum, c.leaves)
        torch.testing.assert_close(slopes, exact, rtol=1e-12, atol=1e-12)
        assert (slopes[0][MASKED] == 0).all()


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("forward_kl", lambda p, q: q - p),
        ("reverse_kl", lambda p, q: q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True))),
        ("taid_kl", lambda p, q: q - p**0.4 * q**0.6 / (p**0.4 * q**0.6).sum(-1, keepdim=True)),
        ("ce", lambda p, q: q - p),
    ],
)
def test_gradient_of_the_hidden_states_is_the_closed_form_through_the_head(name: str, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    c = case()
    labels = c.labels.clamp(min=0)
    losses: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "taid_kl": DENSE["taid_kl"]}
    loss = losses.get(name, token_cross_entropy)
    targets = stored(labels) if name == "ce" else stored(c.teacher)
    q, p = F.linear(*c.leaves).detach().softmax(-1), F.one_hot(labels, V) if name == "ce" else c.teacher.softmax(-1)
    slope = formula(p, q) * c.row_weights[:, None]
    found = torch.autograd.grad(chunked_sum(*c.leaves, targets, loss, c.row_weights, 4).sum, c.leaves)
    expected = slope @ c.weight.detach(), slope.t() @ c.hidden.detach(), slope.sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@EITHER_WAY
def test_masked_rows_are_never_looked_at(recompute: bool) -> None:
    c = case()
    hidden, teacher = c.hidden.detach().clone(), c.teacher.clone()
    hidden[MASKED], teacher[MASKED] = torch.nan, torch.nan
    hidden.requires_grad_()
    clean = chunked_sum(*c.leaves, stored(c.teacher), reverse_kl, c.row_weights, 4, recompute)
    found = chunked_sum(hidden, c.weight, c.bias, stored(teacher), reverse_kl, c.row_weights, 4, recompute)
    assert torch.equal(found.sum, clean.sum)
    slopes = torch.autograd.grad(found.sum, [hidden, c.weight, c.bias])
    torch.testing.assert_close(slopes, torch.autograd.grad(clean.sum, c.leaves), rtol=0, atol=0)


@EITHER_WAY
def test_gradient_of_the_sum_scales_all_gradients(recompute: bool) -> None:
    c = case()
    value = chunked_sum(*c.leaves, head(*c.parts), forward_kl, c.row_weights, 4, recompute).sum
    once = torch.autograd.grad(value, c.leaves, retain_graph=True)
    twice = torch.autograd.grad(value, c.leaves, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    torch.testing.assert_close(twice, tuple(2 * g for g in once), rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, c.leaves), once, rtol=0, atol=0)  # nothing was scaled in place


@EVERY
@EITHER_WAY
def test_no_scored_row_gives_zero_loss_and_zero_gradients(name: str, recompute: bool) -> None:
    c = case()
    loss, targets, _ = setting(name, c)
    value, rows, _ = chunked_sum(*c.leaves, targets, loss, torch.zeros(N), recompute=recompute)
    assert value == 0
    assert rows.shape == (N,)
    slopes = torch.autograd.grad(value, c.leaves)
    assert all(g.shape == leaf.shape and (g == 0).all() for g, leaf in zip(slopes, c.leaves, strict=True))


@EITHER_WAY
def test_tied_embedding_gets_both_contributions(recompute: bool) -> None:
    c = case()
    embedding = c.weight.detach().clone().requires_grad_()
    tokens = torch.arange(N) % V
    value = chunked_sum(embedding[tokens].tanh(), embedding, None, stored(c.teacher), forward_kl, c.row_weights, 4, recompute).sum
    logits = F.linear(embedding[tokens].tanh(), embedding)
    expected = (forward_kl(logits, c.teacher) * c.row_weights).sum()
    torch.testing.assert_close(torch.autograd.grad(value, embedding), torch.autograd.grad(expected, embedding), rtol=1e-12, atol=1e-12)


@EITHER_WAY
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(recompute: bool, trained: tuple[bool, bool, bool]) -> None:
    c = case()
    whole = torch.autograd.grad(chunked_sum(*c.leaves, head(*c.parts), forward_kl, c.row_weights, 4).sum, c.leaves)
    hidden, weight, bias = leaves = [leaf.detach().clone().requires_grad_(wanted) for leaf, wanted in zip(c.leaves, trained, strict=True)]
    chunked_sum(hidden, weight, bias, head(*c.parts), forward_kl, c.row_weights, 4, recompute).sum.backward()
    for leaf, wanted, gradient in zip(leaves, trained, whole, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-12)


@EITHER_WAY
def test_teacher_and_row_weights_get_no_gradient(recompute: bool) -> None:
    c = case()
    parts = [part.requires_grad_() for part in c.parts]
    row_weights = c.row_weights.requires_grad_()
    chunked_sum(*c.leaves, head(*parts), reverse_kl, row_weights, 4, recompute).sum.backward()
    assert all(tensor.grad is None for tensor in [*parts, row_weights])


def test_without_gradient_nothing_is_differentiated() -> None:
    c = case()
    expected = chunked_sum(*c.leaves, head(*c.parts), forward_kl, c.row_weights, 4).sum.detach()

    def checked(logits: Tensor, teacher: Tensor) -> Tensor:
        assert not logits.requires_grad
        return forward_kl(logits, teacher)

    with torch.no_grad():
        found = chunked_sum(*c.leaves, head(*c.parts), checked, c.row_weights, 4).sum
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_recomputing_reaches_what_the_loss_closes_over() -> None:
    c = case()
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = lambda logits, teacher: forward_kl(logits / temperature, teacher / temperature)  # noqa: E731
    value = chunked_sum(*c.leaves, head(*c.parts), loss, c.row_weights, 4, recompute=True).sum
    expected = (loss(F.linear(*c.leaves), c.teacher) * c.row_weights).sum()
    inputs = [temperature, *c.leaves]
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), rtol=1e-12, atol=1e-12)


@EVERY
@EITHER_WAY
def test_no_tensor_is_as_large_as_all_logits(name: str, recompute: bool) -> None:
    rows, vocabulary, width, chunk = 40, 24, 4, 10
    c = case(rows, vocabulary, width)
    loss, targets, dense = setting(name, c)
    with LargestTensor() as all_at_once:
        loss(F.linear(*c.leaves), *dense).sum().backward()
    assert all_at_once.elements >= rows * vocabulary
    with LargestTensor() as seen:
        chunked_sum(*c.leaves, targets, loss, c.row_weights, chunk, recompute).sum.backward()
    assert seen.elements <= max(chunk * vocabulary, rows * width, vocabulary * width)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "size"), [(16384, 32000, 4096, 2048), (1, 32000, 4096, 64), (0, 10, 4, 64), (100, 4, 8, 128)]
)
def test_chunk_takes_the_memory_of_the_hidden_states_and_is_not_tiny(rows: int, vocabulary: int, width: int, size: int) -> None:
    assert chunk_size(rows, vocabulary, width) == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EITHER_WAY
def test_half_precision_gives_float32_sums_and_gradients_in_the_inputs_precision(dtype: torch.dtype, recompute: bool) -> None:
    c = case(dtype=dtype)
    row_weights = c.row_weights.float()
    value = chunked_sum(*c.leaves, head(*c.parts), reverse_kl, row_weights, 4, recompute).sum
    assert value.dtype == torch.float32
    slopes = torch.autograd.grad(value, c.leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in c.leaves]
    exact = torch.autograd.grad((reverse_kl(F.linear(*wide), c.teacher.double()) * c.row_weights).sum(), wide)
    for slope, reference in zip(slopes, exact, strict=True):
        assert slope.dtype == dtype
        assert (slope.double() - reference).abs().max() < 8 * torch.finfo(dtype).eps * reference.abs().max()


def test_gradient_of_a_half_precision_head_does_not_stall_over_many_chunks() -> None:
    """The same token 1024 times: in bfloat16, adding a 257th part to 256 would change nothing."""
    weight, hidden = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True), torch.ones(1024, 2, dtype=torch.bfloat16)
    labels = torch.zeros(1024, dtype=torch.int64)
    value = chunked_sum(hidden, weight, None, stored(labels), token_cross_entropy, torch.ones(1024), chunk=1).sum
    (slope,) = torch.autograd.grad(value, weight)
    expected = 1024 * torch.tensor([[-0.75], [0.25], [0.25], [0.25]]).expand(4, 2)
    torch.testing.assert_close(slope.float(), expected, rtol=1e-2, atol=0)


def test_gradients_beyond_float16_survive_until_they_are_scaled() -> None:
    weight, hidden = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True), torch.full((2048, 1), 100.0, dtype=torch.float16)
    value = chunked_sum(hidden, weight, None, stored(torch.zeros(2048, dtype=torch.int64)), token_cross_entropy, torch.ones(2048), 64).sum
    (slope,) = torch.autograd.grad(value / 2048, weight)  # the sum's own gradient is 102400
    assert slope.tolist() == [[-50.0], [50.0]]


@EITHER_WAY
def test_works_under_autocast_with_float32_weights(recompute: bool) -> None:
    c = case(dtype=torch.float32)
    exact = torch.autograd.grad(chunked_sum(*c.leaves, head(*c.parts), forward_kl, c.row_weights.float(), 4).sum, c.leaves)
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked_sum(*c.leaves, head(*c.parts), forward_kl, c.row_weights.float(), 4, recompute).sum
    assert value.dtype == torch.float32
    for slope, reference in zip(torch.autograd.grad(value, c.leaves), exact, strict=True):
        assert slope.dtype == torch.float32
        assert (slope - reference).abs().max() < 0.05 * reference.abs().max()
