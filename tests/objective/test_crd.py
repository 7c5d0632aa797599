from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.errors import Refused
from kdrun.objective.crd import CRD
from kdrun.types import Batch, Progress
from tests.objective.toy import LABELS, PROGRESS, STEP, build, context, gradients, make, pick_batch


def crd(seed: int = 0, labels: Tensor = LABELS, **values: float) -> CRD:
    objective = make("crd", **values)
    assert isinstance(objective, CRD)
    objective.setup(context(seed, labels))
    return objective


def drawn(objective: CRD, ids: Tensor, view: int = 0) -> Tensor:
    batch = Batch(torch.zeros(len(ids), 1), ids, ids, torch.full_like(ids, view), {})
    return objective.prepare(batch, PROGRESS).extra["crd_rows"]


def two_sides_as_published(
    vs: Tensor, vt: Tensor, bank_s: Tensor, bank_t: Tensor, rows: Tensor, z: tuple[float, float] | None = None
) -> tuple[Tensor, tuple[float, float]]:
    """Loss [B] and both Z with the formulas taken literally: gathered rows, plain exp and log."""
    n, k = len(bank_s), rows.shape[1] - 1
    exps = [torch.einsum("bd,bkd->bk", v, bank[rows]).div(0.07).exp() for v, bank in ((vs, bank_t), (vt, bank_s))]
    constants = z or (n * exps[0].mean().item(), n * exps[1].mean().item())
    loss = torch.zeros(len(vs), dtype=vs.dtype)
    for e, c in zip(exps, constants, strict=True):
        s = e / c
        loss = loss - (s[:, 0] / (s[:, 0] + k / n + 1e-7)).log() - ((k / n) / (s[:, 1:] + k / n + 1e-7)).log().sum(1)
    return loss, constants


def test_two_steps_match_the_published_formulas() -> None:
    toy = build("crd", torch.float64)
    state = {k: v.clone().double() for k, v in toy.objective.state_dict().items()}
    vs, vt = toy.connectors["student"](toy.taps["pooled"]), toy.connectors["teacher"](toy.signal.taps["pooled"])
    rows = toy.objective.prepare(toy.batch, PROGRESS).extra["crd_rows"]
    expected, z = two_sides_as_published(vs, vt, state["bank_student"], state["bank_teacher"], rows)
    torch.testing.assert_close(toy.terms()["contrast"].sum, expected.sum(), rtol=1e-6, atol=0)
    toy.step()
    own = rows[:, 0]
    for bank, v in (("bank_student", vs), ("bank_teacher", vt)):
        moved = 0.5 * state[bank][own] + 0.5 * v.detach()
        state[bank][own] = moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(toy.objective.state_dict()[bank].double(), state[bank], rtol=0, atol=1e-6)
    expected, _ = two_sides_as_published(vs, vt, state["bank_student"], state["bank_teacher"], rows, z)
    torch.testing.assert_close(toy.terms()["contrast"].sum, expected.sum(), rtol=1e-6, atol=0)


def test_constant_z_makes_the_first_steps_mean_score_one_over_n_and_stays() -> None:
    toy = build("crd")
    assert toy.objective.state_dict()["log_z"].isnan().all()
    toy.step()
    log_z = toy.objective.state_dict()["log_z"].clone()
    # log_mean is per sample the log of the mean of exp(score); N * mean / Z = 1
    total = toy.kept["crd_log_mean"].logsumexp(0) - math.log(STEP) + math.log(len(LABELS))
    torch.testing.assert_close(log_z, total)
    toy.taps["pooled"].data.mul_(-3)
    toy.step()
    assert torch.equal(toy.objective.state_dict()["log_z"], log_z)


def test_banks_are_crossed() -> None:
    toy = build("crd", torch.float64)
    toy.step()
    before = gradients(toy.terms()["contrast"].sum, [toy.taps["pooled"]])[0]
    toy.objective.state_dict()["bank_student"].neg_()
    torch.testing.assert_close(gradients(toy.terms()["contrast"].sum, [toy.taps["pooled"]])[0], before, rtol=0, atol=0)
    toy.objective.state_dict()["bank_teacher"].neg_()
    assert (gradients(toy.terms()["contrast"].sum, [toy.taps["pooled"]])[0] - before).abs().max() > 1e-3


def test_only_the_rows_of_the_step_move_and_have_norm_one() -> None:
    toy = build("crd")
    before = toy.objective.state_dict()["bank_student"].clone()
    toy.step()
    after = toy.objective.state_dict()["bank_student"]
    moved = (before != after).any(1)
    assert set(moved.nonzero().squeeze(1).tolist()) == set(toy.batch.ids.tolist())
    torch.testing.assert_close(after[moved].norm(dim=1), torch.ones(STEP))


def test_both_embeddings_are_trained_and_have_norm_one() -> None:
    toy = build("crd")
    toy.terms()["contrast"].sum.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in toy.connectors.parameters())
    for side in ("crd_student", "crd_teacher"):
        torch.testing.assert_close(toy.kept[side].norm(dim=1), torch.ones(STEP))
        assert not toy.kept[side].requires_grad


def test_negatives_are_distinct_samples_of_other_classes() -> None:
    ids = torch.arange(12)
    rows = drawn(crd(negatives=6), ids)
    assert rows.shape == (12, 7)
    assert torch.equal(rows[:, 0], ids)
    for row, label in zip(rows, LABELS, strict=True):
        assert len(set(row.tolist())) == 7
        assert (LABELS[row[1:]] != label).all()


def test_negatives_depend_on_seed_sample_and_view_but_not_on_the_split() -> None:
    ids = torch.tensor([3, 1, 7, 0, 11])
    objective = crd()
    whole = drawn(objective, ids)
    assert torch.equal(torch.cat([drawn(objective, ids[:2]), drawn(objective, ids[2:])]), whole)
    assert torch.equal(drawn(objective, ids.flip(0)), whole.flip(0))
    assert torch.equal(drawn(crd(), ids), whole)
    assert not torch.equal(drawn(objective, ids, view=1), whole)
    assert not torch.equal(drawn(crd(seed=1), ids), whole)


def test_negatives_are_drawn_evenly() -> None:
    objective = crd(negatives=3)
    rows = torch.cat([drawn(objective, torch.tensor([0]), view) for view in range(2000)])[:, 1:]
    counts = rows.flatten().bincount(minlength=12)[LABELS != 0]
    # 9 rows, 3 of them in each of 2000 draws: mean 666.7, standard deviation of a count sqrt(2000 * 1/3 * 2/3) = 21.1
    assert (counts - 2000 / 3).abs().max() < 4.5 * 21.1


def test_negatives_are_the_same_however_the_draw_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(12)
    whole = drawn(crd(), ids)
    monkeypatch.setattr("kdrun.objective.crd._BLOCK", 30)
    assert torch.equal(drawn(crd(), ids), whole)


def test_ids_that_are_not_trained_on_have_no_row() -> None:
    labels = torch.tensor([-1, 0, 1, -1, 2, 0])
    objective = crd(labels=labels, negatives=2, width=8)
    assert objective.state_dict()["bank_student"].shape == (4, 8)
    assert drawn(objective, torch.tensor([1, 4]))[:, 0].tolist() == [0, 2]
    kept = {"crd_student": torch.eye(8)[:1], "crd_teacher": torch.eye(8)[:1], "crd_log_mean": torch.zeros(1, 2)}
    before = objective.state_dict()["bank_teacher"].clone()
    objective.after_step(torch.tensor([5]), kept, PROGRESS)
    assert (objective.state_dict()["bank_teacher"] != before).any(1).tolist() == [False, False, False, True]
    torch.testing.assert_close(objective.state_dict()["log_z"], torch.full((2,), math.log(4)))


def test_initial_banks_are_uniform_reproducible_and_keyed_by_id() -> None:
    labels = torch.arange(400) % 4
    objective, again = crd(labels=labels, width=128), crd(labels=labels, width=128)
    subset = crd(labels=torch.where(labels == 3, -1, labels), width=128)
    bound = 1 / math.sqrt(128 / 3)
    banks = objective.state_dict()
    for bank in (banks["bank_student"], banks["bank_teacher"]):
        assert bank.shape == (400, 128)
        assert bank.abs().max() <= bound
        # a uniform variable on +-b has mean 0 and variance b^2 / 3 = 1/128; 51200 draws
        assert bank.mean().abs() < 4.5 * math.sqrt(1 / 128 / bank.numel())
        assert bank.var().item() == pytest.approx(1 / 128, rel=0.03)
    assert not torch.equal(banks["bank_student"], banks["bank_teacher"])
    assert torch.equal(again.state_dict()["bank_student"], banks["bank_student"])
    assert torch.equal(subset.state_dict()["bank_student"], banks["bank_student"][labels != 3])
    assert not torch.equal(crd(seed=1, labels=labels, width=128).state_dict()["bank_student"], banks["bank_student"])


def test_more_negatives_than_there_are_is_refused_with_a_remedy() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    with pytest.raises(Refused) as refused:
        crd(labels=labels, negatives=4)
    (problem,) = refused.value.problems
    assert (problem.key, problem.remedy) == ("objective.negatives", "objective.negatives=3 or fewer")
    rows = drawn(crd(labels=labels, negatives=3), torch.tensor([0]))
    assert sorted(rows[0, 1:].tolist()) == [3, 4, 5]


def test_published_number_of_negatives_is_refused_in_a_small_world() -> None:
    with pytest.raises(Refused, match=r"objective\.negatives=9"):
        crd(negatives=16384)


def test_state_of_another_data_set_is_not_loaded() -> None:
    state = crd(labels=torch.arange(20) % 4).state_dict()
    with pytest.raises(ValueError, match="bank_student"):
        crd().load_state_dict(state)
    with pytest.raises(ValueError, match="log_z"):
        crd().load_state_dict({})


def test_whole_state_moves_to_a_device() -> None:
    objective = crd()
    objective.to("meta")
    tensors = {k: v for k, v in vars(objective).items() if isinstance(v, Tensor)}
    assert len(tensors) == 6
    assert {v.device.type for v in tensors.values()} == {"meta"}


def test_crd_plus_kd_adds_hintons_term() -> None:
    plain, both = build("crd"), build("crd", kd_weight=1.0)
    assert set(both.terms()) == {*plain.terms(), "kd"}
    assert not plain.objective.needs().teacher_logits
    assert both.objective.needs().teacher_logits
    torch.testing.assert_close(both.terms()["kd"].sum, build("kd").terms()["kd"].sum)
    assert both.objective.weights(Progress(0, 1, 1))["kd"] == 1.0


def test_scores_do_not_depend_on_the_length_of_the_features_alone() -> None:
    toy = build("crd")
    torch.nn.init.zeros_(toy.connectors["student"].get_parameter("linear.bias"))
    before = toy.terms()["contrast"].sum
    toy.taps["pooled"].data.mul_(10)
    torch.testing.assert_close(toy.terms()["contrast"].sum, before)


def test_prepared_rows_follow_the_batch() -> None:
    toy = build("crd")
    part = toy.objective.prepare(pick_batch(toy.batch, slice(2, 5)), PROGRESS)
    assert torch.equal(part.extra["crd_rows"][:, 0], toy.batch.ids[2:5])
    assert F.one_hot(part.extra["crd_rows"], 12).sum(1).max() == 1
