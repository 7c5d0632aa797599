from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.errors import Refused
from kdrun.losses.divergence import kl_divergence, soft_cross_entropy
from kdrun.losses.token import (
    IGNORED,
    adaptive_kl,
    clipped_share,
    entropy,
    entry_clipped,
    forward_kl,
    generalised_jsd,
    interpolated_target,
    keep_top,
    log_mixture,
    reverse_kl,
    sequence_weights,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    token_cross_entropy,
    total_variation,
)

INF = torch.inf
TEACHER = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
STUDENT = torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=torch.float64)
P, Q = TEACHER.softmax(0), STUDENT.softmax(0)

Divergence = Callable[..., Tensor]
JSD = {beta: partial(generalised_jsd, beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)}
WITH_TEMPERATURE: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_.1": JSD[0.1],
    "jsd_.5": JSD[0.5],
    "jsd_rescaled": partial(generalised_jsd, beta=0.5, rescale=True),
    "total_variation": total_variation,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "clipped_forward": partial(entry_clipped, cap=0.5),
    "clipped_reverse": partial(entry_clipped, cap=0.5, beta=1.0),
    "clipped_jsd": partial(entry_clipped, cap=0.05, beta=0.5),
}
ALL: dict[str, Divergence] = {**WITH_TEMPERATURE, "taid_kl": partial(taid, t=0.4), "taid_ce": partial(taid, t=0.4, value="ce")}
EVERY = pytest.mark.parametrize("name", ALL)
EVERY_TEMPERED = pytest.mark.parametrize("name", WITH_TEMPERATURE)


def value_and_gradient(loss: Divergence, student: Tensor = STUDENT, teacher: Tensor = TEACHER) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype) * 2, torch.randn(*shape, generator=g, dtype=dtype) * 2


def through_softmax(g: Tensor) -> Tensor:
    """dL/dz of dL/dq."""
    return Q * (g - (Q * g).sum())


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (forward_kl, 0.623137, [-0.486854, 0.190050, 0.171803, 0.125001]),
        (reverse_kl, 0.561475, [-0.309787, 0.011777, 0.136617, 0.161392]),
        (JSD[0.5], 0.137984, [-0.084859, 0.022890, 0.033473, 0.028496]),
        (total_variation, 0.486854, [-0.132392, 0.067054, 0.040670, 0.024668]),
        (skew_forward_kl, 0.468700, [-0.319747, 0.110251, 0.118201, 0.091295]),
        (skew_reverse_kl, 0.442569, [-0.252280, 0.041619, 0.107035, 0.103625]),
        (partial(taid, t=0.4), 0.088768, [-0.162518, 0.036599, 0.065114, 0.060805]),
        (partial(taid, t=0.4, value="ce"), 1.363879, [-0.162518, 0.036599, 0.065114, 0.060805]),
        (partial(taid, t=1.0), 0.623137, [-0.486854, 0.190050, 0.171803, 0.125001]),
        (partial(taid, t=1.0, value="ce"), 1.570674, [-0.486854, 0.190050, 0.171803, 0.125001]),
        (lambda s, t: token_cross_entropy(s, torch.tensor(0)), 1.851129, [-0.842940, 0.426933, 0.258948, 0.157060]),
    ],
)
def test_values_and_gradients_of_the_example(loss: Divergence, value: float, gradient: list[float]) -> None:
    found, slope = value_and_gradient(loss)
    assert found.item() == pytest.approx(value, abs=5.1e-7)
    torch.testing.assert_close(slope, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "value"),
    [*zip((JSD[0.1], JSD[0.5], JSD[0.9]), (0.053922, 0.137984, 0.049753), strict=True)]
    + [(partial(adaptive_kl, mu=mu), value) for mu, value in ((0.3, 0.592306), (0.5, 0.592306), (0.9, 0.604341))]
    + [(partial(generalised_jsd, beta=0.5, rescale=True), 0.551934)],
)
def test_further_values_of_the_example(loss: Divergence, value: float) -> None:
    assert loss(STUDENT, TEACHER).item() == pytest.approx(value, abs=5.1e-7)


def test_entropy_of_the_example_is_what_cross_entropy_adds_to_kl() -> None:
    assert entropy(TEACHER).item() == pytest.approx(0.947537, abs=5.1e-7)
    assert (soft_cross_entropy(STUDENT, P) - forward_kl(STUDENT, TEACHER)).item() == pytest.approx(entropy(TEACHER).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("cap", "value", "gradient"),
    [
        (INF, 0.549626, [-0.488058, 0.376117, 0.111942]),
        (0.5, 0.213287, [0.063582, -0.027165, -0.036418]),
        (0.05, -0.236713, [0.063582, -0.027165, -0.036418]),
    ],
)
def test_clipped_entries_of_the_example(cap: float, value: float, gradient: list[float]) -> None:
    teacher, student = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log(), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    found, slope = value_and_gradient(partial(entry_clipped, cap=cap), student, teacher)
    assert found.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(slope, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6)
    assert clipped_share(student, teacher, cap).item() == pytest.approx(0 if cap == INF else 1 / 3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradient_of_jsd_is_its_closed_form(beta: float) -> None:
    u = (1 - beta) * Q * (Q / (beta * P + (1 - beta) * Q)).log()
    torch.testing.assert_close(value_and_gradient(JSD[beta])[1], u - Q * u.sum(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_gradients_of_skew_divergences_are_their_closed_forms(alpha: float) -> None:
    m, w = alpha * P + (1 - alpha) * Q, (1 - alpha) * P + alpha * Q
    forward, reverse = -(1 - alpha) * P / m, (Q / w).log() + 1 - alpha * Q / w
    found = [value_and_gradient(partial(loss, alpha=alpha))[1] for loss in (skew_forward_kl, skew_reverse_kl)]
    torch.testing.assert_close(found, [through_softmax(forward), through_softmax(reverse)], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("mu", "weight"), [(0.5, 0.5), (0.9, 0.695181)])
def test_weights_of_adaptive_kl_carry_no_gradient(mu: float, weight: float) -> None:
    mixed = weight * value_and_gradient(forward_kl)[1] + (1 - weight) * value_and_gradient(reverse_kl)[1]
    torch.testing.assert_close(value_and_gradient(partial(adaptive_kl, mu=mu))[1], mixed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cap", [0.02, 0.3])
def test_gradient_of_clipped_forward_kl_is_its_closed_form(cap: float) -> None:
    student, teacher = draw(7, 5)
    q, p = student.softmax(-1), teacher.softmax(-1)
    kept = (p * (p / q).log() < cap).double()
    expected = q * (p * kept).sum(-1, keepdim=True) - p * kept
    torch.testing.assert_close(value_and_gradient(partial(entry_clipped, cap=cap), student, teacher)[1], expected, rtol=1e-10, atol=1e-14)
    assert 0 < kept.mean() < 1


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(("adaptive", "taid"))])
def test_gradients_match_finite_differences_where_there_is_no_detached_part(name: str) -> None:
    student, teacher = draw(3, 5)
    teacher[:, 4] = -INF if "reverse" not in name else teacher[:, 4]
    assert torch.autograd.gradcheck(lambda x: ALL[name](x, teacher), [student.requires_grad_()])


@EVERY
def test_gradient_sums_to_zero_and_shifts_of_the_logits_change_nothing(name: str) -> None:
    student, teacher = draw(2, 3, 6)
    value, slope = value_and_gradient(ALL[name], student, teacher)
    moved, moved_slope = value_and_gradient(ALL[name], student + 3.0, teacher - 5.0)
    torch.testing.assert_close(slope.sum(-1), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close((moved, moved_slope), (value, slope), rtol=1e-11, atol=1e-13)


@EVERY_TEMPERED
def test_temperature_divides_both_logits(name: str) -> None:
    student, teacher = draw(2, 3, 6)
    loss = WITH_TEMPERATURE[name]
    torch.testing.assert_close(loss(student, teacher, temperature=2.5), loss(student / 2.5, teacher / 2.5), rtol=1e-13, atol=0)


def test_forward_kl_is_that_of_classifiers_to_the_bit() -> None:
    student, teacher = draw(50, 7)
    assert torch.equal(forward_kl(student, teacher, 1.5), kl_divergence(student, teacher, 1.5))


@pytest.mark.parametrize(("small", "forward", "reverse"), [(1e-3, 0.622234, 0.560802), (1e-6, 0.623136, 0.561474)])
def test_jsd_over_its_small_weight_tends_to_the_kls(small: float, forward: float, reverse: float) -> None:
    assert generalised_jsd(STUDENT, TEACHER, small).item() / small == pytest.approx(forward, abs=1e-6)
    assert generalised_jsd(STUDENT, TEACHER, 1 - small).item() / small == pytest.approx(reverse, abs=1e-6)


def test_ends_of_jsd_are_the_kls_and_rescaling_is_continuous_to_them() -> None:
    for beta, kl in ((0.0, forward_kl), (1.0, reverse_kl)):
        for rescale in (False, True):
            assert torch.equal(generalised_jsd(STUDENT, TEACHER, beta, rescale), kl(STUDENT, TEACHER))
        near = generalised_jsd(STUDENT, TEACHER, abs(beta - 1e-6), rescale=True)
        torch.testing.assert_close(near, kl(STUDENT, TEACHER), rtol=0, atol=1e-5)


def test_bounds_and_pinsker() -> None:
    student, teacher = (4 * x for x in draw(500, 6))
    tv, kl = total_variation(student, teacher), forward_kl(student, teacher)
    assert (JSD[0.5](student, teacher) <= math.log(2)).all()
    assert ((tv >= 0) & (tv <= 1)).all()
    assert (tv.square() <= torch.minimum(kl, reverse_kl(student, teacher)) / 2).all()
    for alpha in (0.1, 0.5):
        assert (skew_forward_kl(student, teacher, alpha) <= (1 - alpha) * kl + 1e-12).all()
    assert tv.max() > 0.99  # so that the bounds were tried


@EVERY_TEMPERED
def test_student_that_is_the_teacher_is_at_distance_zero_without_gradient(name: str) -> None:
    student, _ = draw(4, 6)
    value, slope = value_and_gradient(WITH_TEMPERATURE[name], student, student.clone())
    torch.testing.assert_close((value, slope), (torch.zeros_like(value), torch.zeros_like(slope)), rtol=0, atol=1e-15)


def test_skew_of_nothing_is_plain_and_skew_of_all_is_zero() -> None:
    for skewed, plain in ((skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        assert torch.equal(skewed(STUDENT, TEACHER, 0.0), plain(STUDENT, TEACHER))
        assert skewed(STUDENT, TEACHER, 1.0) == 0


def test_adaptive_kl_takes_the_head_from_the_teacher_in_any_order_of_ids() -> None:
    student, teacher = draw(20, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adaptive_kl(student, teacher), adaptive_kl(student[:, order], teacher[:, order]), rtol=1e-12, atol=0)
    certain = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64)  # its first id alone is beyond mu, and the head all the same
    flat = torch.zeros_like(certain)
    gaps = (certain.softmax(-1) - flat.softmax(-1)).abs()[0]
    w = gaps[0] / gaps.sum()
    torch.testing.assert_close(adaptive_kl(flat, certain), w * forward_kl(flat, certain) + (1 - w) * reverse_kl(flat, certain))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_cap_is_the_plain_divergence_and_lower_caps_never_raise_it(beta: float) -> None:
    student, teacher = draw(30, 6)
    losses = [entry_clipped(student, teacher, cap, beta) for cap in (INF, 1.0, 0.3, 0.05, 1e-3)]
    torch.testing.assert_close(losses[0], generalised_jsd(student, teacher, beta), rtol=0, atol=0)
    assert all((lower <= higher).all() for higher, lower in pairwise(losses))
    assert (losses[-1] < losses[0]).any()


def test_taid_at_the_start_is_zero_and_at_the_end_forward_kl_to_the_bit() -> None:
    student, teacher = draw(30, 6)
    value, slope = value_and_gradient(partial(taid, t=0.0), student, teacher)
    assert (value == 0).all()
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-15)
    end, forward = (value_and_gradient(loss, student, teacher) for loss in (partial(taid, t=1.0), forward_kl))
    assert torch.equal(end[0], forward[0])
    assert torch.equal(end[1], forward[1])


@pytest.mark.parametrize("value", ["kl", "ce"])
def test_gradient_of_taid_is_student_minus_target_and_reaches_nothing_else(value: str) -> None:
    student, teacher = draw(10, 6)
    teacher.requires_grad_()
    target = interpolated_target(student.requires_grad_(), teacher, 0.3)
    assert not target.requires_grad
    geometric = student.detach().softmax(-1) ** 0.7 * teacher.detach().softmax(-1) ** 0.3
    torch.testing.assert_close(target.exp(), geometric / geometric.sum(-1, keepdim=True), rtol=1e-12, atol=0)
    taid(student, teacher, torch.tensor(0.3, dtype=torch.float64), value).sum().backward()  # type: ignore[arg-type]
    assert teacher.grad is None
    assert student.grad is not None
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - target.exp(), rtol=1e-11, atol=1e-15)


@EVERY
def test_ids_that_both_mask_are_as_if_they_were_not_there(name: str) -> None:
    student, teacher = draw(4, 5)
    hole = torch.full((4, 2), -INF, dtype=torch.float64)
    value, slope = value_and_gradient(ALL[name], student, teacher)
    masked, masked_slope = value_and_gradient(ALL[name], torch.cat([student, hole], 1), torch.cat([teacher, hole], 1))
    torch.testing.assert_close(masked, value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(masked_slope, torch.cat([slope, torch.zeros_like(hole)], 1), rtol=1e-12, atol=1e-15)


@EVERY
@pytest.mark.parametrize("by", ["student", "teacher"])
def test_ids_that_one_model_masks_leave_value_and_gradient_finite(name: str, by: str) -> None:
    student, teacher = draw(4, 5)
    (student if by == "student" else teacher)[:, 1:3] = -INF
    for t in (0.0, 0.4, 1.0) if "taid" in name else (None,):
        loss = ALL[name] if t is None else partial(ALL[name], t=t)
        value, slope = value_and_gradient(loss, student, teacher)
        assert value.isfinite().all()
        assert slope.isfinite().all()


def test_terms_that_a_mask_would_make_infinite_are_left_out_and_finite_ones_stay() -> None:
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[3] = -INF
    q = student.softmax(0)
    assert forward_kl(student, TEACHER).item() == pytest.approx((P * (P / q).log())[:3].sum().item(), abs=1e-12)
    assert total_variation(student, TEACHER).item() == pytest.approx((P - q).abs().sum().item() / 2, abs=1e-12)
    teacher[3] = -INF
    p = teacher.softmax(0)
    assert reverse_kl(STUDENT, teacher).item() == pytest.approx((Q * (Q / p).log())[:3].sum().item(), abs=1e-12)
    assert forward_kl(STUDENT, teacher).item() == pytest.approx((p * (p / Q).log())[:3].sum().item(), abs=1e-12)


def test_mixture_of_distributions_is_the_log_of_their_mean() -> None:
    a, b = torch.tensor([0.5, 0.5, 0, 0]).double().log(), torch.tensor([0.2, 0, 0.8, 0]).double().log()
    torch.testing.assert_close(log_mixture(a, b, 0.25).exp(), 0.25 * a.exp() + 0.75 * b.exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"temperature": t}) for name in WITH_TEMPERATURE for t in (0.05, 1.0, 20.0)]
    + [(name, {"t": t}) for name in ("taid_kl", "taid_ce") for t in (0.0, 0.4, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_at_extreme_logits_match_float64(name: str, options: dict[str, float], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = ((1e4 * torch.randn(16, 6, generator=g).sign()).to(dtype) for _ in range(2))
    student[0], teacher[0] = torch.arange(6) * 1e3, torch.arange(6).flip(0) * 1e3
    loss = partial(ALL[name], **options)
    value, slope = value_and_gradient(loss, student, teacher)
    exact, exact_slope = value_and_gradient(loss, student.double(), teacher.double())
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    # Some gradients of a reverse KL are beyond float16 here (2e6); nothing else may be infinite.
    fits = exact_slope.to(dtype).isfinite()
    assert fits.all() or dtype == torch.float16
    accuracy = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    scale = exact_slope.abs().max().clamp(min=1).item()
    torch.testing.assert_close(slope.double()[fits], exact_slope[fits], rtol=accuracy, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_and_cross_entropy_at_extreme_and_masked_logits_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, 1e4, -1e4, -INF], [0.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    values = entropy(logits), token_cross_entropy(logits, torch.tensor([0, IGNORED]))
    torch.testing.assert_close(values[0], torch.tensor([math.log(2), math.log(4)]), rtol=1e-6, atol=0)
    torch.testing.assert_close(values[1], torch.tensor([math.log(2), 0.0]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(values[0].sum() + values[1].sum(), logits)
    assert gradient.isfinite().all()


@EVERY
def test_float64_is_kept_and_nothing_is_reduced(name: str) -> None:
    student, teacher = draw(2, 3, 6)
    value = ALL[name](student, teacher)
    assert value.dtype == torch.float64
    assert value.shape == (2, 3)
    torch.testing.assert_close(value[1, 2], ALL[name](student[1, 2], teacher[1, 2]), rtol=1e-12, atol=0)


def test_ignored_tokens_have_no_cross_entropy() -> None:
    """Whoever shifts (the data set: position i is scored by token i + 1), what is not to be learned says 0."""
    targets = torch.tensor([[-100, 3, 2], [-100, 1, -100]])
    mask = targets != -100
    scores = F.one_hot(targets.clamp(min=0), 6).double() * 50  # says what comes next
    torch.testing.assert_close(token_cross_entropy(scores, targets), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    flat = token_cross_entropy(torch.zeros_like(scores), targets)
    torch.testing.assert_close(flat, mask * math.log(6), rtol=1e-6, atol=0, check_dtype=False)


def test_top_k_variant_renormalises_both_models_over_the_teachers_ids() -> None:
    kept = forward_kl(*keep_top(STUDENT, TEACHER, 2))
    assert kept.item() == pytest.approx(0.462117, abs=1e-6)
    torch.testing.assert_close(forward_kl(*keep_top(STUDENT, TEACHER, 4)), forward_kl(STUDENT, TEACHER), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("reduction", "unit", "value"),
    [("token_mean", "token", 1.4), ("seq_mean", "sample", 2.0), ("seq_sum", "sample", 3.5), ("dr", "sample", 0.875)],
)
def test_reductions_of_the_example(reduction: str, unit: str, value: float) -> None:
    losses = torch.tensor([[1.0, 1, 1, 1], [9, 3, 9, 9]])
    mask = torch.tensor([[True, True, True, True], [False, True, False, False]])
    weights, counted = sequence_weights(mask, reduction, max_length=4)
    count = {"token": int(mask.sum()), "sample": 2}[counted]
    assert counted == unit
    assert ((weights * losses).sum() / count).item() == pytest.approx(value, abs=1e-6)
    assert (sequence_weights(torch.zeros_like(mask), reduction, 4).weights == 0).all()


def test_unknown_reductions_are_refused_with_the_nearest_name() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(Refused, match="did you mean token_mean"):
        sequence_weights(mask, "tokenmean")
    with pytest.raises(Refused, match="max_length"):
        sequence_weights(mask, "dr")
