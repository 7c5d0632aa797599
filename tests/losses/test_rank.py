from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.losses.rank import plackett_luce, position_weights, step_losses, target_first_order


def test_order_puts_the_label_first_and_the_rest_by_falling_teacher() -> None:
    t = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1e30, -torch.inf]])
    assert target_first_order(t, torch.tensor([0, 1, 2])).tolist() == [[0, 2, 1], [1, 0, 2], [2, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ties_keep_the_lower_class_first(dtype: torch.dtype) -> None:
    t = torch.tensor([3, 1, 3, 1] * 100, dtype=dtype)[None]
    order = target_first_order(t, torch.tensor([7]))[0].tolist()
    high, low = [c for c in range(400) if c % 2 == 0], [c for c in range(400) if c % 2 == 1 and c != 7]
    assert order == [7, *high, *low]


def test_order_leaves_the_teacher_as_it_was() -> None:
    t = torch.tensor([[2.0, 0.0, 1.0]])
    target_first_order(t, torch.tensor([1]))
    assert t.tolist() == [[2.0, 0.0, 1.0]]


def test_step_losses_of_the_example() -> None:
    s = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    for order, expected in (([0, 2, 1], [1.464369, 1.701413, 0]), ([1, 0, 2], [0.464369, 0.474077, 0])):
        steps = step_losses(s, torch.tensor([order]))
        torch.testing.assert_close(steps, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-6)
        assert steps[0, -1].item() == 0


def test_step_losses_are_those_of_choosing_without_replacement() -> None:
    g = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(4, 9, generator=g, dtype=torch.float64)
    order = torch.stack([torch.randperm(9, generator=g) for _ in range(4)])
    for row, ranking, steps in zip(s, order, step_losses(s, order), strict=True):
        naive = torch.stack([-row[ranking[k:]].softmax(0)[0].log() for k in range(9)])
        torch.testing.assert_close(steps, naive, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_losses_are_float32_finite_and_nonnegative_at_extremes(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    s = (1e4 * torch.randn(4, 50, generator=g).sign()).to(dtype).requires_grad_()
    steps = step_losses(s, torch.stack([torch.randperm(50, generator=g) for _ in range(4)]))
    steps.sum().backward()
    assert steps.dtype == torch.float32
    assert steps.isfinite().all()
    assert (steps >= 0).all()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_common_offset_of_the_logits_costs_no_digits() -> None:
    s = torch.tensor([[1.0, 2.0, 0.5]])
    order = torch.tensor([[0, 2, 1]])
    torch.testing.assert_close(step_losses(s + 8192, order), step_losses(s, order), rtol=1e-6, atol=0)


def test_excluded_class_without_weight_adds_nothing() -> None:
    s = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]], dtype=torch.float64, requires_grad=True)
    value = plackett_luce(s, torch.tensor([[0, 2, 1, 3]]), torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=torch.float64))
    value.sum().backward()
    kept = plackett_luce(s[:, [0, 2]], torch.tensor([[0, 1]]), torch.tensor([0.6, 0.4], dtype=torch.float64))
    torch.testing.assert_close(value, kept, rtol=1e-12, atol=0)
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad[0, [1, 3]].tolist() == [0, 0]


def test_excluded_class_that_has_to_be_chosen_is_infinitely_unlikely() -> None:
    s, weights = torch.tensor([[1.0, -torch.inf, 0.5]]), torch.ones(3) / 3
    assert plackett_luce(s, torch.tensor([[0, 1, 2]]), weights).item() == torch.inf


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_position_weights_match_their_integers(classes: int) -> None:
    integers = torch.tensor([2 ** (classes - k) - 1 for k in range(1, classes + 1)], dtype=torch.float64)
    torch.testing.assert_close(position_weights(classes), integers / integers.sum(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("classes", [64, 129, 1000, 21841])
def test_position_weights_survive_many_classes(classes: int) -> None:
    weights: Tensor = position_weights(classes)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert weights.isfinite().all()
    assert (weights.diff() <= 0).all()
    assert weights[-1] == 0
    assert weights[0].item() == pytest.approx(0.5, abs=1e-9)


def test_gradients_match_finite_differences() -> None:
    g = torch.Generator().manual_seed(2)
    s = torch.randn(3, 6, generator=g, dtype=torch.float64, requires_grad=True)
    order = torch.stack([torch.randperm(6, generator=g) for _ in range(3)])
    weights = torch.rand(3, 6, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: plackett_luce(x, order, weights), [s])
