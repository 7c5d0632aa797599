"""SFD: where it starts, what it draws, and its losses written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.errors import Refused
from kdrun.losses.score import linear_schedule
from kdrun.objective.sfd import FAKE, SFD, STUDENT
from kdrun.student.denoiser import MLPDenoiser
from kdrun.student.generator import OneStepGenerator
from kdrun.types import Batch, Context, ModelSpec, Progress
from tests.objective.diffusion import CLASSES, FORGET, OVERRIDE, SCHEDULE, Made, gaussians, moved, networks
from tests.objective.toy import pick_batch

# -- where it starts ------------------------------------------------------------------------------------------------------


def test_generator_and_fake_score_begin_as_the_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = MLPDenoiser(CLASSES, 2), OneStepGenerator(MLPDenoiser(CLASSES, 2))
    made = Made(student, teacher, (2,))
    for name, value in teacher.state_dict().items():
        assert torch.equal(made.fake.state_dict()[name], value)
        assert torch.equal(student.denoiser.state_dict()[name], value)
    assert all(p.requires_grad for p in made.fake.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {id(p) for p in made.fake.parameters()}.isdisjoint({id(p) for n in (teacher, student) for p in n.parameters()})


@pytest.mark.parametrize("student", [MLPDenoiser(CLASSES, 2), OneStepGenerator(MLPDenoiser(CLASSES, 2, width=8))])
def test_a_student_unlike_the_teacher_is_refused(student: nn.Module) -> None:
    found = SFD().problems({"source": {"exclude": [0]}}, student, MLPDenoiser(CLASSES, 2))
    assert [(p.key, "student=generator_mlp" in p.remedy) for p in found] == [("student", True)]


@pytest.mark.parametrize(("exclude", "forget_weight", "refused"), [([0], 1.0, False), ([], 1.0, True), ([1], 1.0, True), ([], 0.0, False)])
def test_a_source_that_draws_the_forgotten_label_is_refused(exclude: list[int], forget_weight: float, refused: bool) -> None:
    teacher, student = MLPDenoiser(CLASSES, 2), OneStepGenerator(MLPDenoiser(CLASSES, 2))
    objective = SFD(forget_weight=forget_weight, fake_forget_weight=forget_weight)
    found = objective.problems({"source": {"exclude": exclude}}, student, teacher)
    assert [p.key for p in found] == ["source.exclude"] * refused


def test_labels_that_there_are_not_are_refused_at_once() -> None:
    spec = ModelSpec(2, (2,))
    with pytest.raises(Refused) as raised:
        SFD(forget=4, override=9).setup(Context(spec, spec, CLASSES, torch.zeros(1), 0, 1, 1))
    assert [p.key for p in raised.value.problems] == ["objective.forget", "objective.override"]
    with pytest.raises(Refused, match="leaves none to keep"):
        SFD(override=None).setup(Context(spec, spec, 1, torch.zeros(1), 0, 1, 1))


@pytest.mark.parametrize("values", [{"t_min": 712}, {"variant": "dmd"}])
def test_settings_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="legal"):
        SFD(**values)


def test_networks_that_mean_other_noise_by_a_time_are_refused() -> None:
    student, teacher = OneStepGenerator(MLPDenoiser(CLASSES, 2)), MLPDenoiser(CLASSES, 2)
    tree = {"source": {"exclude": [0]}}
    assert not SFD().problems(tree, student, teacher)
    assert [p.key for p in SFD(t_max=1001).problems(tree, student, teacher)] == ["objective.t_max"]
    teacher.schedule = linear_schedule(last=0.03)
    assert [p.key for p in SFD().problems(tree, student, teacher)] == ["student.beta_schedule"]
    teacher.schedule = None  # type: ignore[assignment]
    assert ["schedule" in p.remedy for p in SFD().problems(tree, student, teacher)] == [True]


# -- what is drawn --------------------------------------------------------------------------------------------------------


def test_times_and_latents_have_their_distribution() -> None:
    made = gaussians()
    extra = made.batch(20_000).extra
    for phase in (FAKE, STUDENT):
        t = extra[f"{phase}_t"]
        assert t.shape == (20_000, 2)
        assert (int(t.min()), int(t.max())) == (38, 711)
        assert abs(float(t.double().mean()) - 374.5) < 4 * 194.6 / 40_000**0.5
        for name in ("z", "noise"):
            values = extra[f"{phase}_{name}"]
            assert abs(float(values.mean())) < 4 / 40_000**0.5
            assert abs(float(values.std()) - 1) < 4 / 80_000**0.5
    drawn = torch.stack([extra[f"{phase}_{name}"][:, half, 0] for phase in (FAKE, STUDENT) for name in ("z", "noise") for half in (0, 1)])
    apart = torch.corrcoef(drawn) - torch.eye(8)
    assert apart.abs().max() < 5 / 20_000**0.5  # fresh in each phase, for each half and purpose


def test_draws_do_not_depend_on_the_split() -> None:
    made = networks()
    whole, parts = made.batch(9), [made.batch(4), made.batch(5, first=4)]
    for name, value in whole.extra.items():
        assert torch.equal(torch.cat([p.extra[name] for p in parts]), value), name


def test_a_forgotten_label_without_weight_costs_nothing() -> None:
    made = networks(forget_weight=0.0, fake_forget_weight=0.0)
    batch, both = made.batch(6), networks().batch(6)
    for phase, kept in ((FAKE, "fake_kept"), (STUDENT, "kept")):
        assert set(made.terms(phase, batch)) == {kept}
        assert batch.extra[f"{phase}_z"].shape[1] == 1
        assert torch.equal(batch.extra[f"{phase}_z"][:, 0], both.extra[f"{phase}_z"][:, 0])  # the kept half is as it was


def test_the_override_label_is_the_given_one_or_any_kept_one() -> None:
    fixed = networks().batch(9).extra
    assert fixed["student_labels"][:, 1].eq(FORGET).all()
    assert fixed["student_teacher_labels"][:, 1].eq(OVERRIDE).all()
    assert torch.equal(fixed["student_teacher_labels"][:, 0], fixed["student_labels"][:, 0])
    drawn = networks(override=None, forget=2).batch(3000).extra["student_teacher_labels"][:, 1]
    shares = drawn.bincount(minlength=CLASSES).double() / 3000
    assert shares[2] == 0
    assert (shares[[0, 1, 3]] - 1 / 3).abs().max() < 4 * (2 / 9 / 3000) ** 0.5


# -- its losses -----------------------------------------------------------------------------------------------------------


def by_hand(made: Made, batch: Batch, half: int) -> Tensor:
    """The generator's loss of one half, written out; sum over samples."""
    z, noise, t, own, taught = (batch.extra[f"student_{k}"][:, half] for k in ("z", "noise", "t", "labels", "teacher_labels"))
    x = made.student.module(z, labels=own)
    a, b = SCHEDULE.scales(t, x)
    x_t = a * x + b * noise
    phi, psi = ((x_t - b * n(x_t, labels=c, t=t)) / a for n, c in ((made.teacher, taught), (made.fake, own)))
    gap = phi - psi
    loss = (gap * ((phi - x) - made.objective.alpha * gap)).sum(1) / (phi - x).detach().abs().mean(1)
    return loss.sum()


def test_terms_are_the_losses_written_out() -> None:
    made = moved(networks())
    batch = made.batch(7)
    terms = made.terms(STUDENT, batch)
    torch.testing.assert_close(terms["kept"].sum, by_hand(made, batch, 0), rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["forget"].sum, by_hand(made, batch, 1), rtol=1e-10, atol=0)
    fake = made.terms(FAKE, batch)
    for half, name in enumerate(("fake_kept", "fake_forget")):
        z, noise, t, own = (batch.extra[f"fake_score_{k}"][:, half] for k in ("z", "noise", "t", "labels"))
        x_t = SCHEDULE.diffuse(made.student.module(z, labels=own), t, noise)
        torch.testing.assert_close(fake[name].sum, (made.fake(x_t, labels=own, t=t) - noise).square().sum(), rtol=1e-10, atol=0)
    assert {t.unit for t in (*terms.values(), *fake.values())} == {"sample"}


@pytest.mark.parametrize("kappa", [0.0, 1.0, 4.5])
def test_guidance_mixes_in_what_is_said_without_a_label(kappa: float) -> None:
    """Of teacher and fake score alike, in both phases; kappa 1 is the label alone, kappa 0 none at all."""
    torch.manual_seed(3)
    teacher, student = (
        MLPDenoiser(CLASSES, 2, null_label=True).double(),
        OneStepGenerator(MLPDenoiser(CLASSES, 2, null_label=True)).double(),
    )
    made = moved(Made(student, teacher, (2,), guidance=kappa))
    batch = made.batch(7)

    class Guided:
        def __init__(self, network: nn.Module) -> None:
            self.network = network

        def __call__(self, x: torch.Tensor, labels: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            none = self.network(x, labels=torch.full_like(labels, CLASSES), t=t)
            return none + kappa * (self.network(x, labels=labels, t=t) - none)

    z, noise, t, own, taught = (batch.extra[f"student_{k}"][:, 1] for k in ("z", "noise", "t", "labels", "teacher_labels"))
    x = student(z, labels=own)
    x_t = SCHEDULE.diffuse(x, t, noise)
    phi, psi = (SCHEDULE.to_x0(x_t, t, Guided(n)(x_t, c, t)) for n, c in ((made.teacher, taught), (made.fake, own)))
    gap = phi - psi
    loss = (gap * ((phi - x) - made.objective.alpha * gap)).sum(1) / (phi - x).detach().abs().mean(1)
    torch.testing.assert_close(made.terms(STUDENT, batch)["forget"].sum, loss.sum(), rtol=1e-9, atol=0)
    z, noise, t, own = (batch.extra[f"fake_score_{k}"][:, 0] for k in ("z", "noise", "t", "labels"))
    x_t = SCHEDULE.diffuse(student(z, labels=own), t, noise)
    wanted = (Guided(made.fake)(x_t, own, t) - noise).square().sum()
    torch.testing.assert_close(made.terms(FAKE, batch)["fake_kept"].sum, wanted, rtol=1e-9, atol=0)


def test_guidance_without_a_label_for_none_is_refused() -> None:
    found = SFD(guidance=4.5).problems({"source": {"exclude": [0]}}, OneStepGenerator(MLPDenoiser(CLASSES, 2)), MLPDenoiser(CLASSES, 2))
    assert [p.key for p in found] == ["objective.guidance"]


def test_without_forgetting_it_is_sid_on_the_kept_labels() -> None:
    sfd, sid = moved(networks()), moved(networks(forget_weight=0.0, fake_forget_weight=0.0))
    batch = sfd.batch(7)
    for phase, kept in ((FAKE, "fake_kept"), (STUDENT, "kept")):
        alone = sid.terms(phase, sid.batch(7))[kept].sum
        torch.testing.assert_close(alone, sfd.terms(phase, batch)[kept].sum, rtol=1e-12, atol=0)
        torch.testing.assert_close(sid.loss(phase, sid.batch(7)), alone / 7)


def test_a_label_that_is_its_own_override_is_sid_on_all_labels() -> None:
    """c_f then counts lam_f / (lam_r + lam_f): here 0.5 / 1.5, twice the weight that each of the three kept labels has."""
    made = moved(networks(override=FORGET, forget_weight=0.5, fake_forget_weight=0.5))
    batch = made.batch(6)
    assert torch.equal(batch.extra["student_teacher_labels"], batch.extra["student_labels"])
    each = torch.stack([by_hand(made, batch, half) for half in (0, 1)]) / 6
    torch.testing.assert_close(made.loss(STUDENT, batch), 1.5 * (each * torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)).sum())


def test_before_forgetting_begins_all_labels_weigh_the_same() -> None:
    made = moved(networks(forget_from_step=5, forget_weight=7.0))
    before, after = Progress(4, 10, 10), Progress(5, 10, 10)
    early = made.batch(6, progress=before)
    assert torch.equal(early.extra["student_teacher_labels"], early.extra["student_labels"])
    weights = made.objective.weights(before)
    assert weights["forget"] == weights["kept"] / 3  # the kept term is a mean over three labels
    assert weights["fake_forget"] == weights["fake_kept"] / 3
    assert made.batch(6, progress=after).extra["student_teacher_labels"][:, 1].eq(OVERRIDE).all()
    assert made.objective.weights(after)["forget"] == 7.0


def test_doubling_the_batch_by_repetition_changes_no_loss() -> None:
    made = moved(networks())
    batch = made.batch(5)
    double = Batch(*(torch.cat([v, v]) for v in batch[:4]), {k: torch.cat([v, v]) for k, v in batch.extra.items()})
    for phase in (FAKE, STUDENT):
        torch.testing.assert_close(made.loss(phase, double), made.loss(phase, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("splits", [(8,), (5, 2, 1), (4, 4), (1,) * 8])
@pytest.mark.parametrize("phase", [FAKE, STUDENT])
def test_accumulation_does_not_change_loss_or_gradients(phase: str, splits: tuple[int, ...]) -> None:
    made = moved(networks())
    whole = made.batch(8)
    trained = list((made.fake if phase == FAKE else made.student).parameters())
    starts = [sum(splits[:i]) for i in range(len(splits))]
    parts = [made.loss(phase, pick_batch(whole, slice(a, a + n))) * n / 8 for a, n in zip(starts, splits, strict=True)]
    together, apart = made.loss(phase, whole), torch.stack(parts).sum()
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(apart, trained), torch.autograd.grad(together, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_and_finite_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher = MLPDenoiser(CLASSES, 2, width=16)
    made = Made(OneStepGenerator(copy.deepcopy(teacher)), teacher, (2,), t_min=0, t_max=1000)
    batch = made.batch(16)
    batch = batch._replace(extra={k: v.float() if v.is_floating_point() else v for k, v in batch.extra.items()})
    with torch.no_grad():
        for p in made.fake.parameters():
            p *= 3.0  # far from the teacher; much more would overflow inside a network of half precision
    for phase in (FAKE, STUDENT):
        with torch.autocast("cpu", dtype):
            terms = made.terms(phase, batch)
        loss = torch.stack([t.sum for t in terms.values()]).sum()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        trained = list((made.fake if phase == FAKE else made.student).parameters())
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, trained))
