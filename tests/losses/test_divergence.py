from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.divergence import cross_entropy, kl_between, kl_divergence, nontarget_divergence, target_divergence

INF = torch.inf


def kl(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    return kl_divergence(s, t, temperature)


DIVERGENCES = pytest.mark.parametrize("divergence", [kl, target_divergence, nontarget_divergence])
Divergence = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def test_cross_entropy_is_per_sample() -> None:
    logits = torch.tensor([[1.0, 2, 0.5], [0, 0, 0]], dtype=torch.float64)
    expected = -logits.softmax(1)[torch.arange(2), torch.tensor([0, 2])].log()
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([0, 2])), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision_logits_is_float32(dtype: torch.dtype) -> None:
    logits, y = torch.tensor([[1.0, 2, 0.5]], dtype=dtype), torch.tensor([0])
    assert cross_entropy(logits, y).dtype == torch.float32
    assert cross_entropy(logits, y).item() == pytest.approx(1.464369, abs=1e-6)


def test_kl_matches_its_definition_for_any_leading_shape() -> None:
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = (s / 3).softmax(-1), (t / 3).softmax(-1)
    torch.testing.assert_close(kl_divergence(s, t, 3.0), (q * (q / p).log()).sum(-1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(kl_divergence(s, t, 3.0), F.kl_div(p.log(), q, reduction="none").sum(-1), rtol=1e-10, atol=1e-14)


def test_split_matches_its_definition() -> None:
    s, t, y = torch.tensor([[1.0, 0, -1]], dtype=torch.float64), torch.tensor([[2.0, 1, -1]], dtype=torch.float64), torch.tensor([1])
    p, q = s.softmax(1)[0], t.softmax(1)[0]
    binary = q[1] * (q[1] / p[1]).log() + (1 - q[1]) * ((1 - q[1]) / (1 - p[1])).log()
    pn, qn = p[[0, 2]] / (1 - p[1]), q[[0, 2]] / (1 - q[1])
    torch.testing.assert_close(target_divergence(s, t, y)[0], binary, rtol=1e-12, atol=0)
    torch.testing.assert_close(nontarget_divergence(s, t, y)[0], (qn * (qn / pn).log()).sum(), rtol=1e-12, atol=0)


@DIVERGENCES
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_at_extreme_logits_match_float64(divergence: Divergence, temperature: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    s, t = ((1e4 * torch.randn(8, 6, generator=g).sign()).to(dtype) for _ in range(2))
    y = torch.randint(6, (8,), generator=g)
    s.requires_grad_()
    value = divergence(s, t, y, temperature)
    value.sum().backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), divergence(s.double(), t.double(), y, temperature), rtol=1e-5, atol=1e-6)
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_certain_target_leaves_the_rest_its_exact_log_mass() -> None:
    """1 - p_y is 0 in float32 here; in log space it is exp(-40) and its divergence is a plain number."""
    s, t = torch.tensor([[0.0, 40.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    value = target_divergence(s, t, torch.tensor([1]))
    torch.testing.assert_close(value.double(), target_divergence(s.double(), t.double(), torch.tensor([1])), rtol=1e-6, atol=0)
    assert value > 10


@DIVERGENCES
def test_classes_that_the_teacher_excludes_add_nothing(divergence: Divergence) -> None:
    s = torch.tensor([[1.0, 0.5, -1, 0.3]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.2, 2.0, -1, -INF]], dtype=torch.float64)
    y = torch.tensor([0])
    value = divergence(s, t, y, 2.0)
    value.sum().backward()
    assert value.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    nearly = divergence(s, t.clamp(min=-1e4), y, 2.0)
    torch.testing.assert_close(value, nearly, rtol=1e-12, atol=0)


@DIVERGENCES
def test_classes_that_both_exclude_are_as_if_they_were_not_there(divergence: Divergence) -> None:
    s, t = torch.tensor([[1.0, 0.5, -1, -INF]], dtype=torch.float64), torch.tensor([[0.2, 2.0, -1, -INF]], dtype=torch.float64)
    s.requires_grad_()
    value = divergence(s, t, torch.tensor([0]), 2.0)
    value.sum().backward()
    torch.testing.assert_close(value, divergence(s[:, :3], t[:, :3], torch.tensor([0]), 2.0), rtol=1e-12, atol=0)
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad[0, 3] == 0


@DIVERGENCES
@pytest.mark.parametrize("logits", [[1.0, 0.5, -1], [1.0, -INF, -INF]])
def test_teacher_that_leaves_the_target_alone_gives_finite_gradients(divergence: Divergence, logits: list[float]) -> None:
    s = torch.tensor([logits], requires_grad=True)
    value = divergence(s, torch.tensor([[0.2, -INF, -INF]]), torch.tensor([0]), 1.0)
    value.sum().backward()
    expected = 0.0 if divergence is nontarget_divergence else -s.detach().log_softmax(1)[0, 0].item()
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_student_that_excludes_what_the_teacher_believes_is_infinitely_far() -> None:
    assert kl_divergence(torch.tensor([[0.0, -INF]]), torch.tensor([[0.0, 0.0]])).item() == INF


def test_gradient_of_the_teacher_is_finite_too() -> None:
    log_q = torch.tensor([[0.4, 0.6, 0.0]]).log().requires_grad_()
    kl_between(log_q, torch.tensor([[0.2, 0.3, 0.5]]).log()).sum().backward()
    assert log_q.grad is not None
    assert log_q.grad.isfinite().all()


@DIVERGENCES
def test_gradients_match_finite_differences(divergence: Divergence) -> None:
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t[:, 3] = -INF
    y = torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: divergence(x, t, y, 3.0), [s.requires_grad_()])
