from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.losses.uld import answers_in_turn, firsts, partners, tails, uld

STUDENT = torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=torch.float64)
TEACHER = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()


def value_and_gradient(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = uld(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def test_value_and_gradient_of_the_example() -> None:
    value, gradient = value_and_gradient(STUDENT, TEACHER)
    assert value.item() == pytest.approx(0.428239, abs=5.1e-7)
    torch.testing.assert_close(gradient, torch.tensor([0.215448, -0.268216, -0.162681, 0.215448], dtype=torch.float64), rtol=0, atol=1e-6)


def test_gradient_is_the_sign_at_the_students_ids_through_the_softmax() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(8, 6, generator=g, dtype=torch.float64), torch.randn(8, 4, generator=g, dtype=torch.float64)
    q, order = student.softmax(-1).sort(-1, descending=True)
    p = torch.cat([teacher.softmax(-1).sort(-1, descending=True).values, torch.zeros(8, 2, dtype=torch.float64)], 1)
    sign = torch.zeros_like(student).scatter(-1, order, (q - p).sign())
    q = student.softmax(-1)
    torch.testing.assert_close(
        value_and_gradient(student, teacher)[1], q * (sign - (q * sign).sum(-1, keepdim=True)), rtol=1e-11, atol=1e-15
    )


def test_order_of_either_vocabulary_does_not_matter() -> None:
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        torch.testing.assert_close(uld(STUDENT[order], TEACHER[[2, 0, 1]]), uld(STUDENT, TEACHER), rtol=1e-12, atol=0)


def test_vocabularies_may_differ_in_either_direction_and_padding_adds_nothing() -> None:
    value = uld(STUDENT, TEACHER)
    torch.testing.assert_close(uld(TEACHER, STUDENT), value, rtol=1e-12, atol=0)
    longer = torch.cat([TEACHER, torch.full((5,), -torch.inf, dtype=torch.float64)])
    torch.testing.assert_close(uld(STUDENT, longer), value, rtol=1e-12, atol=0)


def test_equally_sure_models_are_at_distance_zero_without_gradient() -> None:
    value, gradient = value_and_gradient(STUDENT, STUDENT.flip(0))
    assert value == 0
    assert (gradient == 0).all()


def test_distance_is_at_most_two() -> None:
    sure, flat = torch.tensor([50.0, 0, 0, 0], dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    assert 1.99 < uld(sure, flat) <= 2


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_give_the_value_of_float64_and_finite_gradients(temperature: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = ((1e4 * torch.randn(8, v, generator=g).sign()).to(dtype) for v in (6, 9))
    student[0, 0] = teacher[0, 1] = -torch.inf
    value, gradient = value_and_gradient(student, teacher, temperature)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), uld(student.double(), teacher.double(), temperature), rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


def test_partners_are_positions_with_the_same_key() -> None:
    own = answers_in_turn(torch.tensor([[False, True, True, False, True], [False, False, False, False, False]]))
    theirs = answers_in_turn(torch.tensor([[True, False, False, True, True, True], [True, True, True, False, False, False]]))
    assert partners(own, theirs).tolist() == [[-1, 0, -1, -1, 3], [-1, -1, -1, -1, -1]]
    assert partners(theirs, own).tolist() == [[1, -1, -1, 4, -1, -1], [-1, -1, -1, -1, -1, -1]]


def test_tails_are_the_later_positions_of_each_stretch() -> None:
    stretches = torch.tensor([[-1, 0, 0, 0, 1, -1, 2, 2]])
    log_probs = -torch.tensor([[9.0, 1, 2, 4, 8, 9, 16, 32]])
    assert firsts(stretches).int().tolist() == [[0, 1, 0, 0, 1, 0, 1, 0]]
    assert tails(log_probs, stretches)[firsts(stretches)].tolist() == [-6, 0, -32]


def test_a_tail_scales_the_distribution() -> None:
    """Probabilities of a stretch: q times q(tail)."""
    half = torch.tensor(0.5, dtype=torch.float64).log()
    value = uld(STUDENT, TEACHER, tail=half, teacher_tail=half)
    torch.testing.assert_close(value, uld(STUDENT, TEACHER) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("own", "theirs"), [(300, 7), (7, 300)])
def test_a_few_of_many_give_what_the_whole_order_gives(own: int, theirs: int) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, v, generator=g, dtype=torch.float64) for v in (own, theirs))
    q, p = (torch.nn.functional.pad(x.softmax(-1).sort(-1, descending=True).values, (0, 300 - x.shape[-1])) for x in (student, teacher))
    torch.testing.assert_close(uld(student, teacher), (q - p).abs().sum(-1), rtol=1e-12, atol=1e-15)
