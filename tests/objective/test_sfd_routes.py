"""SFD: which way gradient flows, and the fixed points that it leads to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdrun.objective.sfd import FAKE, STUDENT
from kdrun.types import Progress
from tests.objective.diffusion import CLASSES, FORGET, MEAN, OVERRIDE, SCHEDULE, SPREAD, Made, gaussians, moved, networks

# -- gradient routes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_a_fake_score_that_is_the_teacher_moves_nothing(alpha: float) -> None:
    made = networks(alpha=alpha, override=FORGET)
    batch = made.batch(16)
    assert made.loss(STUDENT, batch).abs() < 1e-12
    assert made.gradient(batch).abs().max() < 1e-12
    assert moved(made).gradient(batch).abs().max() > 1e-3


def test_no_gradient_stays_on_teacher_or_fake_score() -> None:
    made = moved(networks())
    made.loss(STUDENT, made.batch(8)).backward()
    assert {p.grad for n in (made.teacher, made.fake) for p in n.parameters()} == {None}
    assert all(p.grad is not None for p in made.student.parameters())


def test_only_the_fake_score_learns_in_its_phase() -> None:
    made = moved(networks())
    made.loss(FAKE, made.batch(8)).backward()
    assert {p.grad for n in (made.teacher, made.student) for p in n.parameters()} == {None}
    assert all(p.grad is not None for p in made.fake.parameters())
    assert made.objective.trained_in(FAKE) == ("connectors.fake_score.",)
    assert made.objective.trained_in(STUDENT) == ("student.",)


@pytest.mark.parametrize("which", ["teacher", "fake"])
def test_gradient_flows_through_both_frozen_networks(which: str) -> None:
    made = moved(networks())
    batch = made.batch(8)
    through = made.gradient(batch)

    class Detached(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
            return self.network(x.detach(), labels, t)

    if which == "teacher":
        made.objective._teacher = Detached(made.teacher)
    else:
        made.connectors["fake_score"] = Detached(made.fake)
    assert (made.gradient(batch) - through).norm() > 0.05 * through.norm()


def test_diff_instruct_pushes_along_the_difference_of_the_predictions() -> None:
    made = moved(networks(variant="diff_instruct"))
    batch = made.batch(8)
    x = made.student.module(batch.extra["student_z"].flatten(0, 1), labels=batch.extra["student_labels"].flatten())
    t, noise = batch.extra["student_t"].flatten(), batch.extra["student_noise"].flatten(0, 1)
    with torch.no_grad():
        x_t = SCHEDULE.diffuse(x, t, noise)
        phi = SCHEDULE.to_x0(x_t, t, made.teacher(x_t, labels=batch.extra["student_teacher_labels"].flatten(), t=t))
        psi = SCHEDULE.to_x0(x_t, t, made.fake(x_t, labels=batch.extra["student_labels"].flatten(), t=t))
        push = (psi - phi) / (phi - x).abs().mean(1, keepdim=True)
    expected = torch.autograd.grad(x, list(made.student.parameters()), grad_outputs=push / 8)
    torch.testing.assert_close(made.gradient(batch), torch.cat([g.flatten() for g in expected]), rtol=1e-9, atol=1e-12)


def test_dropout_acts_in_the_network_that_is_updated_and_in_no_other() -> None:
    made = networks()
    modes: dict[str, bool] = {}
    for name, network in (("student", made.student.module), ("fake", made.fake), ("teacher", made.teacher)):
        network.register_forward_hook(lambda m, args, out, name=name: modes.__setitem__(name, m.training))
    for phase, expected in ((FAKE, {"student": False, "fake": True}), (STUDENT, {"student": True, "fake": False, "teacher": False})):
        modes.clear()
        made.student.train()
        made.connectors.train()  # as the loop leaves them
        made.terms(phase, made.batch(4))
        assert modes == expected


# -- fixed points ---------------------------------------------------------------------------------------------------------


def test_the_fake_score_learns_the_noise_of_the_generators_own_samples() -> None:
    """psi's optimum is E[e | x_t, c]: for G(z, c) = m + s z, b (x_t - a m) / (a^2 s^2 + b^2)."""

    class Linear(nn.Module):
        """eps = slope x + offset for each of a few steps and each label: the family that holds the optimum."""

        takes = ("labels", "t")
        schedule = SCHEDULE

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3 * CLASSES, 2, dtype=torch.float64)

        def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
            slope, offset = self.table((t - 300) * CLASSES + labels).unbind(1)
            return slope[:, None] * x + offset[:, None]

    class Generator(nn.Module):
        takes = ("labels",)

        def __init__(self) -> None:
            super().__init__()
            self.denoiser = Linear()

        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            return torch.tensor(MEAN)[labels][:, None] + torch.tensor(SPREAD)[labels][:, None] * z

    torch.manual_seed(0)
    made = Made(Generator(), Linear(), (1,), t_min=300, t_max=303)
    optimizer = torch.optim.LBFGS(made.fake.parameters(), max_iter=60, line_search_fn="strong_wolfe")
    batch = made.batch(60_000)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = made.loss(FAKE, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = made.fake.table.weight.detach().view(3, CLASSES, 2)
    for row, t in enumerate(range(300, 303)):
        a, b = SCHEDULE.at(t)
        for c in range(CLASSES):
            slope = b / (a**2 * SPREAD[c] ** 2 + b**2)
            expected = torch.tensor([slope, -slope * a * MEAN[c]], dtype=torch.float64)
            # About 7000 (kept) or 20,000 draws of a step and label: four standard errors of the least-squares fit.
            torch.testing.assert_close(learned[row, c], expected, rtol=0, atol=0.04)


def descend(made: Made, steps: int, rows: int, rate: float) -> tuple[Tensor, Tensor]:
    """The generator's mean and spread after two descents with a fake score that is exact at every step."""
    for _ in range(2):
        optimizer = torch.optim.Adam(made.student.parameters(), rate)
        for step in range(steps):
            made.fake.load_state_dict(made.student.module.denoiser.state_dict())  # the exact score of what is generated now
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            made.loss(STUDENT, made.batch(rows, progress=Progress(step, steps, 10))).backward()
            optimizer.step()
    denoiser = made.student.module.denoiser
    return denoiser.mean.detach(), denoiser.spread.detach().abs()


def test_kept_labels_go_to_the_teacher_and_the_forgotten_one_to_its_override() -> None:
    """With an exact fake score: p_G(. | c) = p_teacher(. | c), and p_G(. | c_f) = p_teacher(. | c_o)."""
    made = gaussians()
    with torch.no_grad():
        made.student.module.denoiser.mean += torch.tensor([0.9, -0.4, 0.2, 0.3])
        made.student.module.denoiser.spread += torch.tensor([0.0, -0.2, 0.1, -0.1])
    mean, spread = descend(made, steps=100, rows=256, rate=0.02)
    wanted = [1, 1, 2, 3]
    torch.testing.assert_close(mean, torch.tensor(MEAN, dtype=torch.float64)[wanted], rtol=0, atol=0.05)
    torch.testing.assert_close(spread, torch.tensor(SPREAD, dtype=torch.float64)[wanted], rtol=0, atol=0.05)


def test_at_the_fixed_point_the_expected_gradient_is_zero() -> None:
    made = gaussians()
    with torch.no_grad():  # c_f generates what the teacher has under c_o; the fake score knows it
        for network in (made.student.module.denoiser, made.fake):
            network.mean[FORGET], network.spread[FORGET] = MEAN[OVERRIDE], SPREAD[OVERRIDE]
    assert made.gradient(made.batch(2000)).abs().max() < 1e-12
    with torch.no_grad():
        for network in (made.student.module.denoiser, made.fake):
            network.mean[FORGET] += 0.3
    assert made.gradient(made.batch(2000))[FORGET] > 0.05  # back to the left
