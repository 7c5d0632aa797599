from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kdrun.losses.divergence import soft_cross_entropy
from kdrun.losses.sparse import (
    drawn_targets,
    proposal,
    remaining,
    renormalised,
    rest_bucket,
    sampled_cross_entropy,
    tempered,
    truncated,
    zero_missing,
)
from kdrun.losses.token import forward_kl

INF = torch.inf
TEACHER = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
STUDENT = torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=torch.float64)

Loss = Callable[..., Tensor]
LOSSES: list[Loss] = [renormalised, zero_missing, rest_bucket, truncated]
EVERY = pytest.mark.parametrize("loss", LOSSES)


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    log_probs, ids = teacher.log_softmax(-1).topk(k, -1)
    return ids, log_probs


def draw(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * 2, torch.randn(*shape, generator=g, dtype=torch.float64) * 2


def value_and_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (renormalised, 0.462117, [-0.462117, 0.462117, 0, 0]),
        (zero_missing, 0.999984, [-0.573999, 0.157991, 0.258948, 0.157060]),
        (rest_bucket, 0.619997, [-0.486854, 0.190050, 0.184749, 0.112056]),
        (truncated, 0.768985, [-0.505576, 0.139158, 0.228080, 0.138338]),
    ],
)
def test_values_and_gradients_of_the_example(loss: Loss, value: float, gradient: list[float]) -> None:
    found, slope = value_and_gradient(lambda s: loss(s, *top(TEACHER, 2)), STUDENT)
    assert found.item() == pytest.approx(value, abs=5.1e-7)
    torch.testing.assert_close(slope, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6)


def test_gradient_of_whole_student_variants_is_student_times_mass_minus_target() -> None:
    student, teacher = draw(6, 9)
    ids, log_probs = top(teacher, 3)
    for loss, target in ((truncated, log_probs.exp()), (zero_missing, log_probs.softmax(-1))):
        expected = student.softmax(-1) * target.sum(-1, keepdim=True) - torch.zeros_like(student).scatter(-1, ids, target)
        torch.testing.assert_close(
            value_and_gradient(partial(loss, ids=ids, log_probs=log_probs), student)[1], expected, rtol=1e-11, atol=1e-15
        )


def test_rest_bucket_is_missing_mass_spread_evenly_on_both_sides() -> None:
    student, teacher = draw(20, 9)
    ids, log_probs = top(teacher, 3)
    kept = torch.zeros_like(student, dtype=torch.bool).scatter(-1, ids, True)
    q, p = (torch.where(kept, x, (x * ~kept).sum(-1, keepdim=True) / 6) for x in (student.softmax(-1), teacher.softmax(-1)))
    torch.testing.assert_close(rest_bucket(student, ids, log_probs), (p * (p / q).log()).sum(-1), rtol=1e-11, atol=0)


def test_rest_bucket_never_exceeds_the_full_kl_and_is_it_when_one_id_or_none_is_missing() -> None:
    student, teacher = draw(200, 6)
    full = forward_kl(student, teacher)
    for k in range(1, 7):
        assert (rest_bucket(student, *top(teacher, k)) <= full + 1e-12).all()
    for k in (5, 6):
        found, slope = value_and_gradient(partial(rest_bucket, ids=top(teacher, k)[0], log_probs=top(teacher, k)[1]), student)
        torch.testing.assert_close(found, full, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(slope, student.softmax(-1) - teacher.softmax(-1), rtol=0, atol=1e-12)


def test_every_variant_is_the_full_kl_when_all_ids_are_stored() -> None:
    student, teacher = draw(10, 6)
    for loss in LOSSES:
        torch.testing.assert_close(loss(student, *top(teacher, 6)), forward_kl(student, teacher), rtol=1e-10, atol=1e-14)


def test_truncated_can_be_negative_and_the_divergences_cannot() -> None:
    student = torch.tensor([5.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    values = {loss: loss(student, *top(TEACHER, 1)).item() for loss in LOSSES}
    assert values.pop(truncated) < 0
    assert min(values.values()) >= 0


def test_stored_rest_takes_the_place_of_what_rounding_leaves() -> None:
    ids, log_probs = top(TEACHER, 2)
    exact = TEACHER.softmax(0)[2:].sum().log()
    torch.testing.assert_close(remaining(log_probs), exact, rtol=1e-12, atol=0)
    rounded = log_probs.half()
    assert rest_bucket(STUDENT, ids, rounded, exact).item() == pytest.approx(0.619997, abs=1e-3)
    assert rest_bucket(STUDENT, ids, rounded, exact - 1) != rest_bucket(STUDENT, ids, rounded)


@EVERY
def test_cached_loss_is_the_live_loss_within_float16(loss: Loss) -> None:
    student, teacher = draw(200, 12)
    ids, log_probs = top(teacher, 4)
    half = log_probs.half()
    # Relative error of a log-probability: half an ulp, 2^-11; of the loss: |log p| 2^-11 through p and through log p.
    bound = (log_probs.abs() * 2**-11).amax(-1) * (2 + student.log_softmax(-1).abs().amax(-1) + log_probs.abs().amax(-1))
    assert ((loss(student, ids, half) - loss(student, ids, log_probs)).abs() <= 4 * bound).all()


@EVERY
def test_padding_of_the_stored_ids_changes_nothing(loss: Loss) -> None:
    student, teacher = draw(5, 8)
    ids, log_probs = top(teacher, 3)
    value, slope = value_and_gradient(lambda s: loss(s, ids, log_probs), student)
    for filler in (ids[:, :1], torch.zeros_like(ids[:, :1])):  # an id that is stored already, and any one
        padded = torch.cat([ids, filler, filler], 1), torch.cat([log_probs, torch.full((5, 2), -INF, dtype=torch.float64)], 1)
        found, found_slope = value_and_gradient(partial(loss, ids=padded[0], log_probs=padded[1]), student)
        torch.testing.assert_close((found, found_slope), (value, slope), rtol=1e-12, atol=1e-15)


@EVERY
def test_ids_that_the_student_masks_leave_value_and_gradient_finite(loss: Loss) -> None:
    student, teacher = draw(4, 8)
    ids, log_probs = top(teacher, 3)
    rest = teacher.argsort(-1)[:, :5]
    for masked in (ids[:, :1], ids[:, :2], rest[:, :1], rest):  # some of the stored ids, some of the others, all others
        value, slope = value_and_gradient(lambda s: loss(s, ids, log_probs), student.scatter(-1, masked, -INF))
        assert value.isfinite().all()
        assert slope.isfinite().all()


@EVERY
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_give_the_value_of_float64_and_finite_gradients(loss: Loss, temperature: float, dtype: torch.dtype) -> None:
    student, teacher = (1e4 * x.sign() for x in draw(16, 6))
    ids, log_probs = top(teacher / temperature, 3)
    value, slope = value_and_gradient(lambda s: loss(s, ids, log_probs.to(dtype), temperature=temperature), student.to(dtype))
    assert value.dtype == torch.float32
    exact = loss(student.to(dtype).double(), ids, log_probs.to(dtype).double(), temperature=temperature)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert slope.isfinite().all()


@EVERY
def test_gradients_match_finite_differences(loss: Loss) -> None:
    student, teacher = draw(3, 6)
    assert torch.autograd.gradcheck(lambda s: loss(s, *top(teacher, 3), temperature=1.7), [student.requires_grad_()])


@pytest.mark.parametrize(("missing", "expected"), [(1, [0.490969, 0.297788, 0.211244]), (2, [0.451466, 0.273828, 0.274707])])
def test_both_guesses_of_the_tempered_rest_of_the_example(missing: int, expected: list[float]) -> None:
    _, log_probs = top(TEACHER, 2)
    kept, rest = tempered(log_probs, remaining(log_probs), 2.0, missing)
    torch.testing.assert_close(torch.cat([kept, rest[None]]).exp(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_tempering_by_one_changes_nothing_and_is_exact_for_equal_missing_ids() -> None:
    teacher = torch.tensor([2.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    _, log_probs = top(teacher, 2)
    torch.testing.assert_close(tempered(log_probs, remaining(log_probs), 1.0, 2)[0], log_probs, rtol=1e-12, atol=0)
    torch.testing.assert_close(tempered(log_probs, remaining(log_probs), 3.0, 2)[0], (teacher / 3).log_softmax(0)[:2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_drawn_targets_have_the_teacher_as_expectation_and_normalising_them_would_not(exponent: float) -> None:
    u, weight = proposal(TEACHER, exponent)
    plain, normalised = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):  # all pairs of two draws
            target = torch.zeros(4, dtype=torch.float64)
            target[i] += weight[i] / 2
            target[j] += weight[j] / 2
            plain += u[i] * u[j] * target
            normalised += u[i] * u[j] * target / target.sum()
    torch.testing.assert_close(plain, TEACHER.softmax(0), rtol=1e-12, atol=0)
    assert bool((normalised - plain).abs().max() > 0.01) == (exponent != 1.0)


def test_draws_and_their_weights_come_from_the_proposal() -> None:
    n = 20000
    ids, weights = drawn_targets(TEACHER[None], n, torch.Generator().manual_seed(0), exponent=0.5)
    u, weight = proposal(TEACHER, 0.5)
    torch.testing.assert_close(weights, weight[ids] / n, rtol=1e-12, atol=0)
    spread = (u * (1 - u) / n).sqrt()
    assert ((ids[0].bincount(minlength=4) / n - u).abs() < 5 * spread).all()
    again = drawn_targets(TEACHER[None], n, torch.Generator().manual_seed(0), exponent=0.5)
    assert torch.equal(ids, again[0])


def test_drawn_targets_of_a_masked_id_are_never_drawn() -> None:
    teacher = torch.tensor([[0.0, -INF, 1.0]])
    ids, weights = drawn_targets(teacher, 200, torch.Generator().manual_seed(0), exponent=0.7)
    assert (ids != 1).all()
    assert weights.isfinite().all()


def test_sampled_cross_entropy_over_all_ids_is_the_teachers_with_its_gradient() -> None:
    student, teacher = draw(5, 6)
    ids = torch.arange(6).expand(5, 6)
    found = value_and_gradient(lambda s: sampled_cross_entropy(s, ids, teacher.softmax(-1)), student)
    expected = value_and_gradient(lambda s: soft_cross_entropy(s, teacher.softmax(-1)), student)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    doubled = sampled_cross_entropy(student, ids.repeat(1, 2), teacher.softmax(-1).repeat(1, 2) / 2)  # an id drawn twice
    torch.testing.assert_close(doubled, expected[0], rtol=1e-12, atol=0)
    assert math.isfinite(sampled_cross_entropy(student.index_fill(1, torch.tensor([2]), -INF), ids, teacher.softmax(-1)).sum().item())
