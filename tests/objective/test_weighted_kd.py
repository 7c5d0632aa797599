"""Sample-wise weights by a rule, all on one inner loss (the rivals of TGeo-KD, ICLR 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.objective._weighting import AlphaLog, FreeWeights, ada, annealed, inner_losses, oracle, sample_groups, wls
from kdrun.objective.kd import KD
from kdrun.objective.weighted_kd import WeightedKD
from kdrun.types import Batch, Context, ModelSpec, Output, Progress, Signal, Term
from tests.conftest import Outcome
from tests.engine.running import assert_bit_equal, assert_same_run, assert_same_training, run, run_killed, training_lines, weights
from tests.objective.toy import PROGRESS, ZS, ZT, Y, logit_terms

RULES = ["constant", "annealed", "ada", "wls", "rw", "oracle"]


def ready(classes: int = 3, ids: int = 4, **fields: object) -> WeightedKD:
    objective = WeightedKD(**fields)  # type: ignore[arg-type]
    spec = ModelSpec(classes, (2,))
    objective.setup(Context(spec, spec, classes, torch.arange(ids) % classes, 0, 1, 10))
    return objective


def terms_of(objective: WeightedKD, extra: dict[str, Tensor] | None = None) -> tuple[dict[str, Term], Tensor]:
    ids = torch.arange(2)
    batch = objective.prepare(Batch(ZS, Y, ids, ids, extra or {}), PROGRESS)
    output = Output(ZS, {}, {})
    terms = objective.terms(output, Signal(ZT, {}), batch, "student", nn.ModuleDict())
    return terms, output.keep.get("alpha", torch.zeros(0))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_constant_weight_is_distillation_with_that_ratio(alpha: float) -> None:
    found, _ = terms_of(ready(alpha_constant=alpha))
    other = logit_terms(KD(1 - alpha, alpha, 4.0), ZS, ZT, Y)
    expected = sum(w * other[name].sum.item() for name, w in (("ce", 1 - alpha), ("kd", alpha)) if w)
    assert sum(t.sum.item() for t in found.values()) == pytest.approx(expected, abs=1e-12)


def test_annealing_goes_from_one_to_zero() -> None:
    values = [annealed(Progress(step, 5, 2)) for step in range(5)]
    assert values == [1, 0.75, 0.5, 0.25, 0]
    assert annealed(Progress(0, 1, 1)) == 1
    objective = ready(rule="annealed")
    batch = Batch(ZS, Y, Y, Y, {})
    assert objective.prepare(batch, Progress(5, 11, 2)).extra["alpha"].tolist() == [0.5, 0.5]


def test_ada_is_the_lead_of_the_label_with_the_teacher() -> None:
    t = ZT.softmax(1)
    expected = [t[0, 0] - (t[0, 1] + t[0, 2]) / 2, max(0, t[1, 2] - (t[1, 0] + t[1, 1]) / 2)]
    assert ada(ZT, Y).tolist() == pytest.approx([float(v) for v in expected], abs=1e-12)
    assert ada(ZT, Y)[1] == 0  # the label of the second sample is not the teacher's choice


def test_wls_compares_the_label_losses_and_has_no_gradient() -> None:
    """The example of WSLD, whose weights these are."""
    zs = ZS.clone().requires_grad_()
    found = wls(zs, ZT, Y)
    assert found.tolist() == pytest.approx([0.688976, 0.358574], abs=1e-6)
    assert not found.requires_grad


def test_the_oracle_trusts_the_side_that_is_right() -> None:
    signal = Signal(None, {"corrupted": torch.tensor([True, True, False, False])})
    batch = Batch(
        torch.zeros(4, 1),
        torch.zeros(4, dtype=torch.int64),
        torch.arange(4),
        torch.arange(4),
        {"noisy": torch.tensor([True, False, True, False])},
    )
    groups = sample_groups(signal, batch)
    assert groups.tolist() == [0, 0, 1, 2]
    assert oracle(groups).tolist() == [0, 0, 1, 0.5]


def test_what_the_world_does_not_tell_is_clean() -> None:
    batch = Batch(torch.zeros(2, 1), Y, torch.arange(2), torch.arange(2), {})
    assert sample_groups(Signal(None, {}), batch).tolist() == [2, 2]


def test_free_weights_move_as_one_adam_for_each_of_them() -> None:
    free = FreeWeights(3, lr=0.01)
    reference = [torch.tensor(0.5, requires_grad=True) for _ in range(3)]
    adams = [torch.optim.Adam([p], lr=0.01) for p in reference]
    g = torch.Generator().manual_seed(0)
    for ids in (torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([1, 0]), torch.tensor([2, 0])):
        gradient = torch.randn(len(ids), generator=g)
        free.move(ids, gradient)
        for i, slope in zip(ids.tolist(), gradient, strict=True):
            reference[i].grad = slope.clone()
            adams[i].step()
    assert free.state["alpha"].tolist() == pytest.approx([p.item() for p in reference], abs=1e-6)


def test_free_weights_run_to_the_smaller_loss_and_stay_in_range() -> None:
    free = FreeWeights(2, lr=0.1)
    for _ in range(40):
        free.move(torch.arange(2), torch.tensor([2.0, -3.0]))
    assert free.state["alpha"].tolist() == [0, 1]


def test_the_slope_of_a_free_weight_is_that_of_the_inner_loss() -> None:
    objective = ready(rule="rw")
    ids = torch.arange(2)
    alpha = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    kd, ce = inner_losses(ZS, ZT, Y, 4.0)
    (slope,) = torch.autograd.grad((alpha * kd + (1 - alpha) * ce).sum(), alpha)
    output = Output(ZS, {}, {})
    objective.terms(output, Signal(ZT, {}), objective.prepare(Batch(ZS, Y, ids, ids, {}), PROGRESS), "student", nn.ModuleDict())
    torch.testing.assert_close(output.keep["alpha_slope"], slope, rtol=0, atol=1e-12)
    objective.after_step(ids, output.keep, PROGRESS)
    moved = objective.state_dict()["alpha"]
    assert moved[:2].tolist() == pytest.approx((0.5 - 0.01 * slope.sign()).tolist(), abs=1e-6)  # Adam's first step
    assert moved[2:].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_a_weight_between_zero_and_one_and_no_gradient_through_it(rule: str) -> None:
    objective = ready(rule=rule)
    extra = {"noisy": torch.tensor([True, False])} if rule == "oracle" else {}
    zs, ids = ZS.clone().requires_grad_(), torch.arange(2)
    batch = objective.prepare(Batch(ZS, Y, ids, ids, extra), PROGRESS)
    output = Output(zs, {}, {})
    terms = objective.terms(output, Signal(ZT, {}), batch, "student", nn.ModuleDict())
    (terms["kd"].sum + terms["ce"].sum).backward()
    alpha = output.keep["alpha"]
    assert bool(((alpha >= 0) & (alpha <= 1)).all())
    assert not alpha.requires_grad
    again = ZS.clone().requires_grad_()
    kd, ce = inner_losses(again, ZT, Y, 4.0)
    (alpha * kd + (1 - alpha) * ce).sum().backward()
    torch.testing.assert_close(zs.grad, again.grad, rtol=0, atol=1e-12)


def test_the_log_has_each_sample_s_newest_weight_by_group() -> None:
    log = AlphaLog(6)
    assert log.means() == {}
    log.record(torch.tensor([0, 1, 2, 5]), torch.tensor([0.1, 0.2, 0.6, 0.8]), torch.tensor([0, 0, 1, 2]))
    log.record(torch.tensor([0]), torch.tensor([0.3]), torch.tensor([0]))
    found = log.means()
    assert found == pytest.approx(
        {"alpha_mean": 1.9 / 4, "alpha_corrupted": 0.25, "alpha_noisy": 0.6, "alpha_clean": 0.8, "alpha_gap": 0.35}, abs=1e-6
    )


def test_groups_that_do_not_occur_are_not_reported() -> None:
    log = AlphaLog(3)
    log.record(torch.arange(3), torch.full((3,), 0.5), torch.full((3,), 2))
    assert set(log.means()) == {"alpha_mean", "alpha_clean"}


def test_an_unknown_rule_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="legal values constant, annealed, ada, wls, rw, oracle"):
        WeightedKD(rule="anneal")  # type: ignore[arg-type]


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4,\).*\(9,\)"):
        ready().load_state_dict(ready(ids=9).state_dict())


# -- runs ---------------------------------------------------------------------------------------------------------------


def test_weight_zero_trains_what_labels_alone_train_and_asks_no_teacher(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "objective=ce", "teacher=none"], tmp_path / "ce")
    run([*tiny, "objective=weighted_kd", "objective.alpha_constant=0", "teacher=none"], tmp_path / "zero")
    assert_bit_equal(weights(tmp_path / "zero"), weights(tmp_path / "ce"))


def test_a_constant_weight_trains_what_distillation_with_that_ratio_trains(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "objective=kd", "objective.ce_weight=0.3", "objective.kd_weight=0.7"], tmp_path / "kd")
    run([*tiny, "objective=weighted_kd", "objective.alpha_constant=0.7"], tmp_path / "constant")
    ours, theirs = (training_lines(tmp_path / folder) for folder in ("constant", "kd"))
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=1e-5)


@pytest.mark.parametrize("rule", ["rw", "annealed"])
def test_a_run_killed_in_the_middle_is_resumed_to_the_same_bytes(
    rule: str, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, "objective=weighted_kd", f"objective.rule={rule}", "source.batch_size=40", "optim.epochs=3", "run.checkpoint_every=0.6"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 4)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("rule", ["rw", "wls"])
def test_accumulation_does_not_change_gradients(rule: str, tiny: list[str], tmp_path: Path) -> None:
    base = [*tiny, "objective=weighted_kd", f"objective.rule={rule}"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[20,7,5]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


def test_the_report_stands_beside_the_metrics(tiny: list[str], tmp_path: Path) -> None:
    summary = run([*tiny, "objective=weighted_kd", "objective.rule=oracle", "dataset.noise=0.4"], tmp_path / "run")
    found = summary["test"]
    assert (found["alpha_noisy"], found["alpha_clean"]) == (1.0, 0.5)
    assert 0.5 < found["alpha_mean"] < 1
    assert math.isfinite(F.softplus(torch.tensor(found["nll"])).item())
