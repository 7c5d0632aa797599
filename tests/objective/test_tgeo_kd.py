"""TGeo-KD (ICLR 2024): the geometry, the exact hypergradient of one step, what each phase may touch, and runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.objective._weighting import inner_losses
from kdrun.objective.kd import KD
from kdrun.objective.tgeo_kd import FEATURES, Controller, TGeoKD, geometry, outer_losses
from kdrun.student.taps import Tapped
from kdrun.types import Batch, Connectors, Context, ModelSpec, Output, Progress, Signal, Start
from tests.conftest import Outcome
from tests.engine.processes import kdrun_to_end
from tests.engine.running import assert_same_run, assert_same_training, run, run_killed, training_lines
from tests.objective.toy import PROGRESS, ZS, ZT, Y, logit_terms

PHASE = "optim.phases={controller:{name:adam,lr:1e-2,momentum:null,weight_decay:0,schedule:{name:constant}}}"
TGEO = ["objective=tgeo_kd", "dataset.validation=0.25", "source.held_out=12", PHASE]


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -- the example: z = W x with W = 0, two samples, a teacher that is wrong on the second ------------------------------

X, LABELS, TEACHER = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]), double([2, 0], [1, 0])
HELD_OUT = double([0.5, 1]), torch.tensor([1])


def linear() -> nn.Linear:
    network = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(network.weight)
    return network


def as_batch(inputs: Tensor, targets: Tensor, held_out: tuple[Tensor, Tensor] | None = None) -> Batch:
    ids = torch.arange(len(targets))
    extra = {} if held_out is None else {"held_out_inputs": held_out[0], "held_out_targets": held_out[1]}
    return Batch(inputs, targets, ids, ids, extra)


def example(u: Tensor) -> Tensor:
    """J_out of the example for the pre-sigmoid values u [2] of alpha."""
    return outer_losses(linear(), lambda logits: u.sigmoid(), as_batch(X, LABELS), TEACHER, HELD_OUT, 2.0, 1.0).mean()


def test_inner_losses_of_the_example() -> None:
    kd, ce = inner_losses(torch.zeros(2, 2, dtype=torch.float64), TEACHER, LABELS, 2.0)
    assert kd.tolist() == pytest.approx([0.443776, 0.121199], abs=1e-6)
    assert ce.tolist() == pytest.approx([0.693147, 0.693147], abs=1e-6)
    assert (0.5 * kd + 0.5 * ce).mean().item() == pytest.approx(0.487818, abs=1e-6)


def test_virtual_step_and_outer_loss_of_the_example() -> None:
    network = linear()
    kd, ce = inner_losses(network(X), TEACHER, LABELS, 2.0)
    (0.5 * kd + 0.5 * ce).mean().backward()
    moved = network.weight - network.weight.grad
    torch.testing.assert_close(moved, double([0.240529, -0.063770], [-0.240529, 0.063770]), rtol=0, atol=1e-6)
    expected = F.cross_entropy(HELD_OUT[0] @ moved.T, HELD_OUT[1]).item()
    assert expected == pytest.approx(0.751236, abs=1e-6)
    assert example(torch.zeros(2, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)


def test_hypergradient_of_the_example_is_the_closed_form() -> None:
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(example(u), u)
    assert found.tolist() == pytest.approx([-0.002501, 0.098370], abs=1e-6)
    network = linear()
    kd, ce = inner_losses(network(X), TEACHER, LABELS, 2.0)
    slopes = [torch.autograd.grad(row, network.weight, retain_graph=True)[0] for row in kd - ce]
    (inner,) = torch.autograd.grad((0.5 * kd + 0.5 * ce).mean(), network.weight)
    moved = (network.weight.detach() - inner).requires_grad_()
    (g_v,) = torch.autograd.grad(F.cross_entropy(HELD_OUT[0] @ moved.T, HELD_OUT[1]), moved)
    expected = [-(1 / 2) * 0.25 * (g_v * slope).sum().item() for slope in slopes]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_hypergradient_of_a_controller_of_two_parameters_matches_finite_differences() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    g = torch.Generator().manual_seed(1)
    inputs, teacher, held = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (6, 6, 4))
    targets, held_targets = torch.arange(6) % 3, torch.arange(4) % 3

    def outer(w: Tensor) -> Tensor:
        def alpha(logits: Tensor) -> Tensor:
            return (w[0] + w[1] * (teacher.softmax(1) - logits.softmax(1)).square().sum(1)).sigmoid()

        return outer_losses(network, alpha, as_batch(inputs, targets), teacher, (held, held_targets), 4.0, 0.5).mean()

    w = double([0.3, -0.8])[0].requires_grad_()
    (found,) = torch.autograd.grad(outer(w), w)
    step = 1e-5
    for i in range(2):
        shift = step * F.one_hot(torch.tensor(i), 2).double()
        difference = (outer(w.detach() + shift) - outer(w.detach() - shift)) / (2 * step)
        assert found[i].item() == pytest.approx(difference.item(), abs=1e-6 * abs(difference.item()))
    assert found.abs().min() > 0


# -- geometry -----------------------------------------------------------------------------------------------------------


def test_features_of_the_example() -> None:
    teacher = double([2, 0])
    mean = torch.cat([teacher.softmax(1), double([0.5, 0.5])])
    phi = geometry(FEATURES["option3"], double([0, 0]), teacher, torch.tensor([0]), mean).view(9, 2)
    expected = double(
        [0.5, 0.5], [0.880797, 0.119203], [1, 0], [0.880797, 0.119203],
        [0.145006, 0.145006], [0.25, 0.25], [0.145006, 0.145006], [0.014209, 0.014209], [0.014209, 0.014209],
    )  # fmt: skip
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("features", "blocks"),
    [
        ("option1", 4),
        ("option2", 3),
        ("option3", 9),
        ("option4", 6),
        ("option5", 5),
        ("option6", 9),
        ("option7", 2),
        ("sg_tg", 5),
        ("intra", 6),
    ],
)
def test_every_set_of_features_has_its_width_and_feeds_a_controller(features: str, blocks: int) -> None:
    phi = geometry(FEATURES[features], ZS, ZT, Y, torch.full((3, 3), 1 / 3))
    assert phi.shape == (2, 3 * blocks)
    objective, connectors = ready(features=features)
    alpha = objective.alpha(ZS, ZT, Signal(ZT, {}), as_batch(ZS, Y), connectors)
    assert alpha.shape == (2,)
    assert bool(((alpha > 0) & (alpha < 1)).all())


def test_angles_are_products_of_two_edges() -> None:
    s, t, mean = ZS.softmax(1), ZT.softmax(1), torch.full((3, 3), 1 / 3, dtype=torch.float64)
    label = F.one_hot(Y, 3)
    expected = torch.cat([(mean[Y] - s) * (label - s), (t - s) * (label - s)], 1)
    torch.testing.assert_close(geometry(FEATURES["option7"], ZS, ZT, Y, mean), expected)


def ready(classes: int = 3, dtype: torch.dtype = torch.float64, **fields: object) -> tuple[TGeoKD, Connectors]:
    torch.manual_seed(0)
    objective = TGeoKD(**fields)  # type: ignore[arg-type]
    spec = ModelSpec(classes, (2,))
    connectors = objective.setup(Context(spec, spec, classes, torch.arange(4) % classes, 0, 1, 10))
    return objective, connectors.to(dtype)


def test_class_mean_is_the_teacher_s_by_label_and_uniform_where_no_sample_is() -> None:
    objective, connectors = ready()
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 5.0]])
    rows = [(as_batch(logits[a:b], torch.tensor([0, 2, 0])[a:b]), Signal(logits[a:b], {})) for a, b in ((0, 2), (2, 3))]
    objective.start(Start(nn.Identity(), None, lambda: iter(rows)), connectors)
    mean = objective.state_dict()["class_mean"]
    torch.testing.assert_close(mean[0], (logits[0].softmax(0) + logits[2].softmax(0)) / 2)
    torch.testing.assert_close(mean[2], logits[1].softmax(0))
    torch.testing.assert_close(mean[1], torch.full((3,), 1 / 3))
    torch.testing.assert_close(mean.sum(1), torch.ones(3))


# -- what each phase touches --------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A student with BatchNorm, whose training forward moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc = nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.fc1(x))))


def step_of(phase: str, **fields: object) -> tuple[TGeoKD, Connectors, Tapped, dict[str, Tensor]]:
    """One phase on a student with BatchNorm, differentiated: objective, connectors, student, the terms' sums."""
    objective, connectors = ready(dtype=torch.float32, **fields)
    student = Tapped(Normed().train(), {})
    g = torch.Generator().manual_seed(3)
    inputs, held = torch.randn(8, 2, generator=g), torch.randn(5, 2, generator=g)
    batch = as_batch(inputs, torch.arange(8) % 3, (held, torch.arange(5) % 3))
    signal = Signal(torch.randn(8, 3, generator=g), {})
    for name, p in [*student.named_parameters(prefix="student"), *connectors.named_parameters(prefix="connectors")]:
        p.requires_grad_(name.startswith(objective.trained_in(phase)))
    terms, _ = objective.compute(student, batch, signal, phase, connectors, None)
    torch.stack([t.sum for t in terms.values()]).sum().backward()
    return objective, connectors, student, {name: t.sum.detach() for name, t in terms.items()}


def test_controller_gets_a_gradient_and_the_student_stays_as_it_was() -> None:
    _, connectors, student, terms = step_of("controller")
    torch.manual_seed(0)
    ready(dtype=torch.float32)
    untouched = Tapped(Normed().train(), {})
    assert set(terms) == {"outer"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in connectors.parameters())
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), untouched.state_dict().values(), strict=True))
    assert all(p.grad is None for p in student.parameters())
    assert int(student.module.bn.num_batches_tracked) == 0  # type: ignore[union-attr, arg-type]


def test_student_gets_a_gradient_and_the_controller_none() -> None:
    _, connectors, student, terms = step_of("student")
    assert set(terms) == {"kd", "ce"}
    assert all(p.grad is None for p in connectors.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert int(student.module.bn.num_batches_tracked) == 1  # type: ignore[union-attr, arg-type]


def test_a_descent_step_on_the_controller_lowers_the_outer_loss() -> None:
    torch.manual_seed(0)
    network, controller = nn.Linear(3, 3).double(), Controller(27, [32, 16]).double()
    g = torch.Generator().manual_seed(1)
    inputs, teacher, held = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (12, 12, 8))
    targets, held_targets = torch.arange(12) % 3, torch.arange(8) % 3
    mean = torch.full((3, 3), 1 / 3)

    def outer() -> Tensor:
        def alpha(logits: Tensor) -> Tensor:
            return controller(geometry(FEATURES["option3"], logits, teacher, targets, mean))

        return outer_losses(network, alpha, as_batch(inputs, targets), teacher, (held, held_targets), 4.0, 0.5).mean()

    before = outer()
    slopes = torch.autograd.grad(before, list(controller.parameters()))
    with torch.no_grad():
        for p, slope in zip(controller.parameters(), slopes, strict=True):
            p -= 0.1 * slope
    assert outer().item() < before.item()


def test_alpha_is_a_constant_of_the_student_s_loss() -> None:
    objective, connectors = ready()
    zs = ZS.clone().requires_grad_()
    output = Output(zs, {}, {})
    terms = objective.terms(output, Signal(ZT, {}), as_batch(ZS, Y), "student", connectors)
    (terms["kd"].sum + terms["ce"].sum).backward()
    alpha, again = output.keep["alpha"], ZS.clone().requires_grad_()
    kd, ce = inner_losses(again, ZT, Y, 4.0)
    (alpha * kd + (1 - alpha) * ce).sum().backward()
    torch.testing.assert_close(zs.grad, again.grad, rtol=1e-12, atol=1e-12)
    assert objective.report() == {}  # nothing recorded before the step is done


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (-1e4, {"ce_weight": 1.0, "kd_weight": 0.0}),
        (1e4, {"ce_weight": 0.0, "kd_weight": 1.0}),
        (0.0, {"ce_weight": 0.5, "kd_weight": 0.5}),
    ],
)
def test_a_constant_controller_is_distillation_with_a_fixed_ratio(bias: float, expected: dict[str, float]) -> None:
    objective, connectors = ready()
    for p in connectors.parameters():
        nn.init.zeros_(p)
    nn.init.constant_(list(connectors.parameters())[-1], bias)
    terms = objective.terms(Output(ZS, {}, {}), Signal(ZT, {}), as_batch(ZS, Y), "student", connectors)
    fixed = KD(temperature=4.0, **expected)
    other = logit_terms(fixed, ZS, ZT, Y)
    loss = sum(fixed.weights(PROGRESS)[name] * term.sum for name, term in other.items())
    assert (terms["kd"].sum + terms["ce"].sum).item() == pytest.approx(float(loss), abs=1e-12)


def test_a_teacher_that_repeats_the_label_has_a_finite_hypergradient() -> None:
    teacher = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], dtype=torch.float64)  # T = G
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = outer_losses(linear(), lambda logits: u.sigmoid(), as_batch(X, LABELS), teacher, HELD_OUT, 2.0, 1.0).mean()
    (found,) = torch.autograd.grad(loss, u)
    assert found.isfinite().all()
    objective, connectors = ready(classes=2)
    alpha = objective.alpha(torch.zeros(2, 2, dtype=torch.float64), teacher, Signal(teacher, {}), as_batch(X, LABELS), connectors)
    assert all(g.isfinite().all() for g in torch.autograd.grad(alpha.sum(), list(connectors.parameters())))


def test_the_controller_acts_on_every_kth_step() -> None:
    objective, _ = ready(outer_every=3)
    assert [objective.active("controller", Progress(s, 10, 1)) for s in range(5)] == [True, False, False, True, False]
    assert all(objective.active("student", Progress(s, 10, 1)) for s in range(5))


def test_outer_loss_is_a_mean_over_the_validation_rows() -> None:
    objective, _ = ready()
    batch = as_batch(X, LABELS, HELD_OUT)
    assert {k: int(v) for k, v in objective.count(batch).items()} == {"sample": 2, "label": 2, "held_out": 1}
    assert "held_out" in objective.units()


def test_a_hidden_layer_without_units_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden=\[32, 0\]: legal range"):
        TGeoKD(hidden=[32, 0])


# -- runs ---------------------------------------------------------------------------------------------------------------


def test_the_run_reports_alpha_and_moves_the_controller(tiny: list[str], tmp_path: Path) -> None:
    summary = run([*tiny, *TGEO, "dataset.noise=0.3"], tmp_path / "run")
    assert 0 < summary["test"]["alpha_mean"] < 1
    assert {"alpha_noisy", "alpha_clean"} <= summary["test"].keys()
    phases = [(line["step"], line["phase"], set(line["terms"])) for line in training_lines(tmp_path / "run")]
    assert phases[:2] == [(1, "controller", {"outer"}), (1, "student", {"kd", "ce"})]
    assert all(line["grad_norm"] > 0 for line in training_lines(tmp_path / "run"))


def test_without_validation_rows_it_is_refused(tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    refused = kdrun("train", *tiny, "objective=tgeo_kd", f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert "source.held_out" in refused.err


def test_a_split_of_the_batch_is_refused(tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    refused = kdrun("train", *tiny, *TGEO, "hardware.micro_batch=8", f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert "hardware.micro_batch" in refused.err


@pytest.mark.parametrize(("step", "every"), [(2, 1), (5, 1), (4, 2)])
def test_a_run_killed_in_the_middle_is_resumed_to_the_same_bytes(
    step: int, every: int, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, *TGEO, f"objective.outer_every={every}", "source.batch_size=40", "optim.epochs=3", "run.checkpoint_every=0.6"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(tiny: list[str], tmp_path: Path) -> None:
    base = [*tiny, *TGEO, "source.batch_size=33"]
    run(base, tmp_path / "one")
    ranks = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2", "hardware.threads=1"]
    done = kdrun_to_end("train", *base, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--quiet")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_a_copy_of_the_student_is_not_changed_either() -> None:
    """The virtual step of a network that is used elsewhere: nothing of it is kept."""
    network = Normed().train()
    before = copy.deepcopy(network.state_dict())
    u = torch.zeros(4, requires_grad=True)
    outer_losses(
        network,
        lambda logits: u.sigmoid(),
        as_batch(torch.randn(4, 2), torch.arange(4) % 3),
        torch.randn(4, 3),
        (torch.randn(3, 2), torch.arange(3)),
        4.0,
        0.1,
    ).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
