"""OPSD: the capped divergence of the student's own tokens, through the objective."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.engine.records import METRICS, read_lines
from kdrun.losses.token import clipped_share, forward_kl, generalised_jsd, keep_top, reverse_kl
from kdrun.teacher.follower import Follower
from kdrun.types import Batch, Progress
from tests.dataset.texts import V, alone, batch_of, samples, tiny
from tests.engine.running import assert_same_training, run
from tests.objective.spoken import Said, Step, ready, scored
from tests.objective.test_grpo import pieces
from tests.objective.toy import make
from tests.source.test_rollout import group, uneven

ZS = torch.tensor([0.0, 1, 0], dtype=torch.float64)
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
LENGTHS = [5, 9, 3, 7, 6]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "sampled_token")


def one(zs: Tensor, zt: Tensor, tokens: int = 0, **values: Any) -> Step:
    """One position."""
    student, teacher = Said(zs[None, None].clone()), Said(zt[None, None].clone())
    return Step(ready("opsd", student, teacher, classes=len(zs), **values), student, teacher, [scored((1, 1), torch.tensor([[tokens]]))])


@pytest.mark.parametrize(
    ("cap", "value", "gradient"),
    [
        (None, 0.549626, [-0.488058, 0.376117, 0.111942]),
        (0.5, 0.213287, [0.063582, -0.027165, -0.036418]),
        (0.05, -0.236713, [0.063582, -0.027165, -0.036418]),
    ],
)
def test_value_and_gradient_of_the_example(cap: float | None, value: float, gradient: list[float]) -> None:
    step = one(ZS, P.log(), cap=cap)
    assert step.loss.item() == pytest.approx(value, abs=1e-6)
    assert step.gradient[0].flatten().tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.1])
@pytest.mark.parametrize("cap", [None, 0.3, 0.02])
def test_gradient_of_the_forward_kl_is_its_closed_form(cap: float | None, temperature: float) -> None:
    """dL/dz_j = (q_j P_U - p_j [j in U]) / T, U the entries below the cap."""
    g = torch.Generator().manual_seed(1)
    zs, zt = torch.randn(2, 9, generator=g, dtype=torch.float64)
    p, q = (zt / temperature).softmax(-1), (zs / temperature).softmax(-1)
    entries = p * (p / q).log()
    below = entries < (math.inf if cap is None else cap)
    assert cap is None or not below.all()
    step = one(zs, zt, cap=cap, temperature=temperature)
    assert step.loss.item() == pytest.approx(torch.where(below, entries, cap or 0.0).sum().item(), rel=1e-12)
    expected = (q * p[below].sum() - torch.where(below, p, 0.0)) / temperature
    torch.testing.assert_close(step.gradient[0].flatten(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("cap", [None, 0.5, 0.01])
def test_a_teacher_that_is_the_student_teaches_nothing(divergence: str, cap: float | None) -> None:
    student = tiny()
    step = Step(ready("opsd", student, tiny(), divergence=divergence, cap=cap), student, tiny(), [batch_of(alone(samples(LENGTHS)))])
    assert abs(step.loss.item()) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in step.gradient)


@pytest.mark.parametrize(("divergence", "plain"), [("forward_kl", "forward_kl"), ("reverse_kl", "reverse_kl"), ("jsd", "jsd")])
def test_without_a_cap_it_is_on_policy_distillation(divergence: str, plain: str) -> None:
    """GKD with lambda 1: the same divergence of the same rollouts, from any teacher."""
    student, teacher = tiny(), tiny("gpt2")
    (batch,) = group(uneven(), student, batch_size=9)
    ours = Step(ready("opsd", student, teacher, divergence=divergence, cap=None), student, teacher, [batch])
    theirs = Step(ready(plain, student, teacher), student, teacher, [batch])
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    for mine, other in zip(ours.gradient, theirs.gradient, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_lower_caps_never_raise_the_loss_and_reach_no_negative_entry(divergence: str) -> None:
    g = torch.Generator().manual_seed(2)
    zs, zt = 2 * torch.randn(2, 9, generator=g, dtype=torch.float64)
    losses = [one(zs, zt, cap=cap, divergence=divergence).loss.item() for cap in (None, 1.0, 0.3, 0.05, 1e-3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    plain = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": lambda s, t: generalised_jsd(s, t, 0.5)}[divergence]
    assert losses[0] == pytest.approx(plain(zs, zt).item(), rel=1e-12)
    p, q = zt.softmax(-1), zs.softmax(-1)
    m = (p + q) / 2
    entries = {"forward_kl": p * (p / q).log(), "reverse_kl": q * (q / p).log(), "jsd": (p * (p / m).log() + q * (q / m).log()) / 2}[
        divergence
    ]
    assert losses[-1] == pytest.approx(entries.clamp(max=1e-3).sum().item(), rel=1e-9)


def test_gradient_of_a_sampled_token_is_that_of_the_reverse_kl_in_expectation() -> None:
    """By enumeration of y ~ q: KL(q || p) .515504, both gradients [-.362478, .312537, .049941]."""
    q = ZS.softmax(-1)
    steps = [one(ZS, P.log(), tokens=y, divergence="sampled_token") for y in range(3)]
    expected = sum((q[y] * steps[y].gradient[0].flatten() for y in range(3)), start=torch.zeros(3, dtype=torch.float64))
    assert expected.tolist() == pytest.approx([-0.362478, 0.312537, 0.049941], abs=1e-6)
    exact = one(ZS, P.log(), divergence="reverse_kl", cap=None)
    assert exact.loss.item() == pytest.approx(0.515504, abs=1e-6)
    torch.testing.assert_close(expected, exact.gradient[0].flatten(), rtol=1e-10, atol=1e-12)
    for y, step in enumerate(steps):
        assert step.loss.item() == pytest.approx((-(P[y].log() - q[y].log()) * q[y].log()).item(), rel=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rollouts_carry_no_gradient_and_are_the_same_as_given_texts(divergence: str) -> None:
    """The student's own tokens, or the same tokens out of a file: one gradient."""
    student, teacher = tiny(), tiny("gpt2")
    (batch,) = group(uneven(), student, batch_size=9)
    given = Batch(batch.inputs.clone(), batch.targets.clone(), batch.ids, batch.view, {"position_ids": batch.extra["position_ids"].clone()})
    ours, theirs = (
        Step(ready("opsd", student, teacher, divergence=divergence, cap=0.2), student, teacher, [rows]) for rows in (batch, given)
    )
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours.gradient, theirs.gradient, strict=True))
    assert max(g.abs().max() for g in ours.gradient) > 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_any_split_and_chunks_give_one_gradient(divergence: str) -> None:
    student, teacher, rows = tiny(), tiny("gpt2"), alone(samples(LENGTHS))
    values = {"divergence": divergence, "cap": 0.2, "temperature": 1.1}
    # the teacher's head is tied to its embedding, a plain product all the same
    whole = Step(ready("opsd", student, teacher, projection="whole", **values), student, teacher, [batch_of(rows)])
    for projection in ("whole", "chunked"):
        objective = ready("opsd", student, teacher, projection=projection, **values)
        cut = Step(objective, student, teacher, [batch_of(rows, index=torch.tensor(part)) for part in ([3, 0], [4], [1, 2])])
        torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-10, atol=1e-13)
        for mine, other in zip(cut.gradient, whole.gradient, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-11)


def test_the_mean_is_over_tokens_and_over_sequences_where_it_is_said() -> None:
    zs, zt = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64)
    zt[0, 0] = torch.tensor([2.0, 1, 0, -1])
    kl = forward_kl(zs[0, 0], zt[0, 0]).item()
    targets = torch.tensor([[1, -1, -1], [0, 2, 3]])
    student, teacher = Said(zs), Said(zt)
    for reduction, share in (("token_mean", 1 / 4), ("seq_mean", 1 / 2)):
        objective = ready("opsd", student, teacher, classes=4, cap=None, reduction=reduction)
        assert Step(objective, student, teacher, [scored((2, 3), targets)]).loss.item() == pytest.approx(share * kl, rel=1e-6)


def test_the_top_k_variant_looks_at_the_teachers_likeliest_ids_alone() -> None:
    g = torch.Generator().manual_seed(3)
    zs, zt = torch.randn(2, 9, generator=g, dtype=torch.float64)
    step = one(zs, zt, top_k=3, cap=0.1)
    ids = zt.topk(3).indices
    expected = one(zs[ids], zt[ids], cap=0.1)
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    slope = step.gradient[0].flatten()
    torch.testing.assert_close(slope[ids], expected.gradient[0].flatten())
    assert slope.count_nonzero() == 3
    assert one(zs, zt, top_k=9, cap=0.1).loss == one(zs, zt, cap=0.1).loss == one(zs, zt, top_k=50, cap=0.1).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_loss_and_gradient_are_finite_at_extremes(divergence: str, temperature: float, dtype: torch.dtype) -> None:
    zs = torch.tensor([[[1e4, -1e4, 0.0, -torch.inf], [0.0, 0, 0, -torch.inf]]], dtype=dtype)
    zt = torch.tensor([[[-1e4, 1e4, 0.0, -torch.inf], [1e4, 0, 0, -torch.inf]]], dtype=dtype)
    student, teacher = Said(zs), Said(zt)
    objective = ready("opsd", student, teacher, classes=4, divergence=divergence, temperature=temperature, cap=0.5)
    step = Step(objective, student, teacher, [scored((1, 2), torch.tensor([[0, 1]]))])
    assert step.loss.isfinite()
    assert step.gradient[0].isfinite().all()


def test_half_precision_is_widened() -> None:
    g = torch.Generator().manual_seed(3)
    zs, zt = torch.randn(2, 9, generator=g).bfloat16()
    for divergence in DIVERGENCES:
        half, full = one(zs, zt, divergence=divergence), one(zs.float(), zt.float(), divergence=divergence)
        assert half.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "values", [{"divergence": "tv"}, {"cap": 0}, {"cap": -1}, {"beta": 1.5}, {"top_k": 0}, {"temperature": 0}, {"projection": "half"}]
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        make("opsd", **values)


def test_it_needs_a_teacher_and_a_language_model() -> None:
    objective = make("opsd")
    assert objective.needs().teacher_logits
    tree = {"teacher": {"kind": "none"}, "hardware": {}, "source": {}}
    assert [p.key for p in objective.problems(tree, nn.Linear(2, 2), None)] == ["student"]


# -- what the cap cuts, and teachers that follow the student --------------------------------------------------------------


@pytest.mark.parametrize("projection", ["whole", "chunked"])
@pytest.mark.parametrize("values", [{}, {"divergence": "jsd"}, {"temperature": 1.3, "top_k": 6}])
def test_the_share_of_clipped_entries_is_told_of_a_whole_step_however_it_is_cut(projection: str, values: dict[str, Any]) -> None:
    student, teacher, batch = tiny(), tiny("gpt2"), batch_of(alone(samples(LENGTHS)))
    objective = ready("opsd", student, teacher, projection=projection, cap=0.02, **values)
    assert objective.report() == {}
    step = Step(objective, student, teacher, pieces(batch, [2, 3]))
    objective.after_step(step.ids, step.kept, Progress(0, 30, 3))
    keep = batch.targets >= 0
    with torch.no_grad():
        said, theirs = (net(batch.inputs, position_ids=batch.extra["position_ids"]).logits[..., :V][keep] for net in (student, teacher))
    if "top_k" in values:
        said, theirs = keep_top(said, theirs, 6)
    beta = 0.5 if "divergence" in values else 0.0
    expected = clipped_share(said, theirs, 0.02, beta, values.get("temperature", 1.0)).mean().item()
    assert 0 < expected < 1
    assert objective.report() == {"clipped_share": pytest.approx(expected, rel=1e-5)}
    again = make("opsd", **values)
    again.load_state_dict(objective.state_dict())
    assert again.report() == objective.report()


@pytest.mark.parametrize("values", [{"cap": None}, {"divergence": "sampled_token"}])
def test_without_a_cap_nothing_is_told(values: dict[str, Any]) -> None:
    student, teacher = tiny(), tiny("gpt2")
    objective = ready("opsd", student, teacher, **values)
    step = Step(objective, student, teacher, [batch_of(alone(samples(LENGTHS)))])
    objective.after_step(step.ids, step.kept, Progress(0, 30, 3))
    assert objective.report() == {}


@pytest.mark.parametrize("kind", ["ema", "current"])
def test_a_teacher_that_follows_the_student_is_asked_in_chunks_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    words = [
        "dataset=sums", "dataset.n_train=33", "dataset.n_test=10", f"teacher={kind}", "teacher.prompt=privileged", "student=sum_policy",
        "objective=opsd", "objective.cap=0.5", "source=rollout", "source.batch_size=11", "source.max_new_tokens=6", "optim=adamw",
        "optim.lr=0.01", "optim.epochs=2", "evaluation=generation", "evaluation.max_new_tokens=6", "hardware=cpu", "hardware.threads=1",
        "run.log_every=1",
    ]  # fmt: skip
    run([*words, "objective.projection=whole"], tmp_path / "whole")
    asked: list[bool] = []
    original = Follower.signal
    monkeypatch.setattr(Follower, "signal", lambda self, batch, needs: asked.append(needs.teacher_logits) or original(self, batch, needs))
    run([*words, "objective.projection=chunked"], tmp_path / "chunked")
    assert asked
    assert not any(asked)  # its logits are never made at once
    assert_same_training(tmp_path / "chunked", tmp_path / "whole", rtol=1e-4)
    shares = [[line["clipped_share"] for line in read_lines(tmp_path / name / METRICS) if "split" in line] for name in ("whole", "chunked")]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
