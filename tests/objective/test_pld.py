from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrun.losses.rank import target_first_order
from tests.objective.toy import PROGRESS, logit_terms, make

S = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
T = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)
WEIGHTINGS = ["pld", "ce", "listmle", "plistmle"]

examples = settings(derandomize=True, max_examples=40, deadline=None)
seeds, sizes = st.integers(0, 10**6), st.integers(2, 12)
temperatures = st.sampled_from([0.3, 1.0, 4.0])


def pld(s: Tensor, t: Tensor, y: Tensor | int, temperature: float = 1.0, weighting: str = "pld") -> Tensor:
    """The loss of the samples, summed."""
    labels = torch.full((len(s),), y) if isinstance(y, int) else y
    return logit_terms(make("pld", temperature=temperature, weighting=weighting), s, t, labels)["pld"].sum


def draw(seed: int, classes: int, samples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(samples, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(classes, (samples,), generator=g)


def closed_form(s: Tensor, t: Tensor, y: int, tau: float) -> tuple[float, Tensor]:
    """Loss and gradient of one sample, step by step as the paper writes them."""
    order = [y, *sorted((c for c in range(len(s)) if c != y), key=lambda c: (-t[c].item(), c))]
    q = torch.softmax(t / tau, 0)
    loss, grad = 0.0, torch.zeros_like(s)
    for k, chosen in enumerate(order):
        left = order[k:]
        p = torch.softmax(s[left], 0)
        loss += (q[chosen] * (torch.logsumexp(s[left], 0) - s[chosen])).item()
        grad[left] += q[chosen] * p
        grad[chosen] -= q[chosen]
    return loss, grad


@pytest.mark.parametrize(
    ("y", "tau", "loss", "gradient"),
    [
        (0, 1.0, 1.390542, [-0.511421, 0.618209, -0.106787]),
        (0, 2.0, 1.264341, [-0.389370, 0.569495, -0.180124]),
        (1, 1.0, 0.357183, [-0.230338, -0.033444, 0.263782]),
    ],
)
def test_value_and_gradient_of_the_example(y: int, tau: float, loss: float, gradient: list[float]) -> None:
    s = S.clone().requires_grad_()
    value = pld(s, T, y, tau)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(s.grad, torch.tensor([gradient], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("weighting", "loss"), [("ce", 1.464369), ("listmle", 1.055261), ("plistmle", 1.523630)])
def test_value_of_the_example_under_other_weights(weighting: str, loss: float) -> None:
    assert pld(S, T, 0, weighting=weighting).item() == pytest.approx(loss, abs=1e-6)


@examples
@given(seeds, sizes, temperatures)
def test_loss_and_gradient_match_the_closed_form(seed: int, classes: int, tau: float) -> None:
    s, t, y = draw(seed, classes)
    s.requires_grad_()
    value = pld(s, t, y, tau)
    value.backward()
    expected = [closed_form(s[i].detach(), t[i], int(y[i]), tau) for i in range(len(s))]
    assert value.item() == pytest.approx(sum(loss for loss, _ in expected), abs=1e-10)
    torch.testing.assert_close(s.grad, torch.stack([grad for _, grad in expected]), rtol=0, atol=1e-10)


@examples
@given(seeds, sizes, st.sampled_from(WEIGHTINGS), st.floats(-50, 50))
def test_loss_is_nonnegative_and_free_of_shifts(seed: int, classes: int, weighting: str, shift: float) -> None:
    s, t, y = draw(seed, classes)
    s.requires_grad_()
    value = pld(s, t, y, weighting=weighting)
    value.backward()
    assert value.item() >= 0
    torch.testing.assert_close(pld(s + shift, t, y, weighting=weighting), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pld(s, t + shift, y, weighting=weighting), value, rtol=1e-10, atol=1e-10)
    assert s.grad is not None
    assert s.grad.sum(1).abs().max() < 1e-12


@examples
@given(seeds, sizes, st.sampled_from(WEIGHTINGS))
def test_loss_follows_a_relabelling_of_the_classes(seed: int, classes: int, weighting: str) -> None:
    s, t, y = draw(seed, classes)
    renamed = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))  # new class i was renamed[i]
    value = pld(s[:, renamed], t[:, renamed], renamed.argsort()[y], weighting=weighting)
    torch.testing.assert_close(value, pld(s, t, y, weighting=weighting), rtol=1e-12, atol=1e-12)


@examples
@given(seeds, sizes, st.sampled_from(WEIGHTINGS))
def test_loss_is_convex_in_the_student(seed: int, classes: int, weighting: str) -> None:
    a, t, y = draw(seed, classes)
    b, _, _ = draw(seed + 1, classes)
    middle, ends = pld((a + b) / 2, t, y, weighting=weighting), pld(a, t, y, weighting=weighting) + pld(b, t, y, weighting=weighting)
    assert middle.item() <= ends.item() / 2 + 1e-12


def test_cold_weights_give_cross_entropy_where_the_teacher_is_right() -> None:
    expected = F.cross_entropy(S, torch.tensor([0])).item()
    assert pld(S, T, 0, temperature=1e-3).item() == pytest.approx(expected, abs=1e-12)
    assert pld(S, T, 0, temperature=0.2).item() != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("y", [1, 2])
def test_cold_weights_give_the_second_choice_where_the_teacher_is_wrong(y: int) -> None:
    rest = [c for c in range(3) if c != y]
    second = torch.logsumexp(S[0, rest], 0) - S[0, 0]  # the teacher's top class among all but y is class 0
    assert pld(S, T, y, temperature=1e-3).item() == pytest.approx(second.item(), abs=1e-12)


def test_hot_weights_give_listmle_over_classes() -> None:
    s, t, y = draw(0, 7)
    assert pld(s, t, y, temperature=1e9).item() == pytest.approx(pld(s, t, y, weighting="listmle").item(), abs=1e-7)


def test_loss_vanishes_as_the_student_follows_the_ranking_with_growing_gaps() -> None:
    order = target_first_order(T, torch.tensor([2]))
    losses = []
    for gap in (1.0, 10.0, 100.0):
        s = torch.empty_like(T).scatter(1, order, -gap * torch.arange(3, dtype=torch.float64)[None])
        losses.append(pld(s, T, 2).item())
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-40


def test_scale_of_the_student_counts() -> None:
    assert abs(pld(2 * S, T, 0).item() - pld(S, T, 0).item()) > 0.1


def test_temperature_softens_the_weights_alone() -> None:
    assert pld(S, T / 2, 0, temperature=1.0).item() == pytest.approx(pld(S, T, 0, temperature=2.0).item(), abs=1e-12)


def test_ties_rank_the_lower_class_first() -> None:
    s, flat, y = draw(3, 6, samples=1)
    flat = torch.zeros_like(flat)
    loss, _ = closed_form(s[0], flat[0], int(y[0]), 1.0)
    assert pld(s, flat, y).item() == pytest.approx(loss, abs=1e-12)
    expected = [int(y[0]), *(c for c in range(6) if c != int(y[0]))]
    assert target_first_order(flat, y)[0].tolist() == expected


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("classes", [3, 100, 1000])
def test_extreme_logits_give_finite_loss_and_gradient(weighting: str, classes: int) -> None:
    g = torch.Generator().manual_seed(0)
    s, t = (1e4 * torch.randn(4, classes, generator=g).sign() for _ in range(2))
    s.requires_grad_()
    value = pld(s, t, torch.arange(4) % classes, weighting=weighting)
    value.backward()
    assert value.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_classes_that_both_exclude_change_nothing_but_the_count(weighting: str) -> None:
    s, t, y = draw(5, 6)
    masked = torch.full((3, 2), -torch.inf, dtype=torch.float64)
    wide_s, wide_t = torch.cat([s, masked], 1).requires_grad_(), torch.cat([t, masked], 1)
    value = pld(wide_s, wide_t, y, weighting=weighting)
    value.backward()
    assert value.isfinite()
    assert wide_s.grad is not None
    assert not wide_s.grad[:, 6:].any()
    assert wide_s.grad.isfinite().all()
    if weighting in ("pld", "ce"):
        torch.testing.assert_close(value, pld(s, t, y, weighting=weighting), rtol=1e-12, atol=1e-12)
    if weighting == "listmle":
        torch.testing.assert_close(value * 8, pld(s, t, y, weighting=weighting) * 6, rtol=1e-12, atol=1e-12)


def test_label_the_teacher_excludes_is_still_ranked_first() -> None:
    t = T.clone()
    t[0, 1] = -torch.inf
    q = (T[0, [0, 2]]).softmax(0)
    second = torch.logsumexp(S[0, [0, 2]], 0) - S[0, 0]
    assert pld(S, t, 1).item() == pytest.approx((q[0] * second).item(), abs=1e-12)
    assert pld(S, t, 1, weighting="ce").item() == pytest.approx(F.cross_entropy(S, torch.tensor([1])).item(), abs=1e-12)


def test_there_is_one_term_of_weight_one() -> None:
    objective = make("pld")
    assert objective.weights(PROGRESS) == {"pld": 1.0}
    assert set(logit_terms(objective, S, T, torch.tensor([0]))) == {"pld"}
