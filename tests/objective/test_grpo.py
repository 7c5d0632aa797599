"""GRPO: its numbers, on the rows that a rollout brings, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrun.losses.policy import group_advantages
from kdrun.source.rollout import ADVANTAGE, BEHAVIOUR
from kdrun.types import Batch, Needs
from tests.conftest import Outcome
from tests.dataset.texts import V, alone, batch_of, samples, tiny
from tests.objective.spoken import Said, Step, ready, scored
from tests.objective.toy import make

LENGTHS = [5, 9, 3, 7, 6]


def told(logits: Tensor, tokens: Tensor, ratio: Tensor, advantage: Tensor, temperature: float = 1.0) -> Batch:
    """Rows whose tokens were drawn with probabilities that make these ratios."""
    said = torch.log_softmax(logits / temperature, -1).gather(-1, tokens[..., None])[..., 0]
    batch = scored((tokens.shape[0], tokens.shape[1]), tokens)
    return batch._replace(extra={BEHAVIOUR: said.detach() - ratio.log(), ADVANTAGE: advantage})


def texts(temperature: float = 1.0, seed: int = 0) -> Batch:
    """Sequences of uneven length with behaviour and advantages of their own."""
    batch = batch_of(alone(samples(LENGTHS)))
    g = torch.Generator().manual_seed(seed)
    shape = batch.targets.shape
    behaviour = -torch.rand(shape, generator=g, dtype=torch.float64) * 3
    advantage = torch.randn(shape[0], 1, generator=g, dtype=torch.float64).expand(shape)
    return batch._replace(extra={**batch.extra, BEHAVIOUR: behaviour, ADVANTAGE: torch.where(batch.targets >= 0, advantage, 0.0)})


def pieces(batch: Batch, sizes: list[int]) -> list[Batch]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    cut = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    return [Batch(batch.inputs[c], batch.targets[c], batch.ids[c], batch.view[c], {k: v[c] for k, v in batch.extra.items()}) for c in cut]


@pytest.mark.parametrize(("advantage", "rho", "value"), [(1, 1.5, 1.28), (1, 0.5, 0.5), (-1, 1.5, -1.5), (-1, 0.5, -0.8)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_clipped_values_of_the_example(advantage: float, rho: float, value: float, temperature: float) -> None:
    """The bounds 0.8 and 1.28 are the defaults."""
    logits = torch.tensor([[[0.0, 1.0, 0.5, 0.0]]], dtype=torch.float64)
    batch = told(logits, torch.tensor([[1]]), torch.full((1, 1), rho).double(), torch.full((1, 1), float(advantage)).double(), temperature)
    student = Said(logits)
    step = Step(ready("grpo", student, None, classes=4, temperature=temperature), student, None, [batch])
    assert step.loss.item() == pytest.approx(-value, abs=1e-12)
    clipped = value in (1.28, -0.8)
    assert (step.gradient[0].abs().max() == 0) == clipped


def test_advantages_of_the_example_through_the_source() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    found = group_advantages(rewards, "unbiased")
    assert found[0].item() == pytest.approx(1.207381, abs=1e-6)
    assert found[1].item() == pytest.approx(-0.724429, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_the_first_update_it_is_the_policy_gradient(temperature: float) -> None:
    """rho = 1: the gradient is that of -mean A log q."""
    student = tiny()
    batch = texts()
    keep = batch.targets >= 0
    logits = student(batch.inputs, position_ids=batch.extra["position_ids"]).logits[..., :V]
    said = torch.log_softmax(logits / temperature, -1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    batch = batch._replace(extra={**batch.extra, BEHAVIOUR: said.detach()})
    step = Step(ready("grpo", student, None, temperature=temperature), student, None, [batch])
    expected = torch.autograd.grad(-(batch.extra[ADVANTAGE] * said)[keep].mean(), list(student.parameters()))
    for mine, other in zip(step.gradient, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert step.loss.item() == pytest.approx(-batch.extra[ADVANTAGE][keep].mean().item(), abs=1e-12)


@pytest.mark.parametrize(("reduction", "more"), [("token_mean", {}), ("seq_mean", {}), ("dr", {"max_length": 9}), ("seq_sum", {})])
def test_reductions_and_any_split_give_one_gradient(reduction: str, more: dict[str, Any]) -> None:
    student, batch = tiny(), texts()
    make_step = lambda cut: Step(ready("grpo", student, None, reduction=reduction, **more), student, None, pieces(batch, cut))  # noqa: E731
    whole = make_step([5])
    for cut in ([1] * 5, [3, 2]):
        part = make_step(cut)
        torch.testing.assert_close(part.loss, whole.loss, rtol=1e-10, atol=1e-12)
        for mine, other in zip(part.gradient, whole.gradient, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-11)


def test_the_mean_is_over_tokens() -> None:
    """Two sequences of 1 and 3 tokens with ratio 1: -(A1 + 3 A2) / 4, and by sequences -(A1 + A2) / 2."""
    logits = torch.zeros(2, 3, 4, dtype=torch.float64)
    targets = torch.tensor([[1, -1, -1], [0, 2, 3]])
    advantage = torch.tensor([[2.0], [-1.0]], dtype=torch.float64).expand(2, 3) * (targets >= 0)
    batch = told(logits, targets.clamp(min=0), torch.ones(2, 3).double(), advantage)._replace(targets=targets)
    student = Said(logits)
    for reduction, value in (("token_mean", 0.25), ("seq_mean", -0.5)):
        step = Step(ready("grpo", student, None, classes=4, reduction=reduction), student, None, [batch])
        assert step.loss.item() == pytest.approx(value, abs=1e-7)  # weights of tokens are float32


def test_chunks_give_what_the_whole_gives() -> None:
    student, batch = tiny(), texts()
    whole, chunked = (Step(ready("grpo", student, None, projection=kind), student, None, [batch]) for kind in ("whole", "chunked"))
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-12, atol=1e-12)
    for mine, other in zip(chunked.gradient, whole.gradient, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert max(g.abs().max() for g in whole.gradient) > 0


def test_ratios_beyond_all_bounds_give_finite_gradients() -> None:
    logits = torch.tensor([[[200.0, -200.0], [200.0, -200.0]]], dtype=torch.float32)
    batch = scored((1, 2), torch.tensor([[0, 1]]))
    batch = batch._replace(extra={BEHAVIOUR: torch.tensor([[-300.0, 0.0]]), ADVANTAGE: torch.tensor([[-1.0, 1.0]])})
    student = Said(logits)
    step = Step(ready("grpo", student, None, classes=2), student, None, [batch])
    assert step.loss.isfinite()
    assert step.gradient[0].isfinite().all()


def test_no_teacher_is_listened_to() -> None:
    assert make("grpo").needs() == Needs()


# -- refusals -------------------------------------------------------------------------------------------------------------

SUMS = [
    "dataset=sums",
    "dataset.n_train=16",
    "dataset.n_test=4",
    "student=sum_policy",
    "teacher=none",
    "evaluation=generation",
    "hardware=cpu",
]
GROUPS = [*SUMS, "objective=grpo", "source=rollout", "source.batch_size=4", "source.per_prompt=4", "source.max_new_tokens=6"]


@pytest.mark.parametrize(
    ("change", "key", "remedy"),
    [
        (["source.per_prompt=1"], "source.per_prompt", "source.per_prompt=8"),
        (["source=loader", "~source.per_prompt", "~source.max_new_tokens"], "source.per_prompt", "source=rollout"),
        (["source.share=0.5"], "source.share", "source.share=1"),
        (["source.temperature=0.8"], "objective.temperature", "objective.temperature=0.8"),
        (["dataset=topics", "~dataset.n_train", "~dataset.n_test", "student=window_lm", "evaluation=language"], "objective", "a reward"),
        (["dataset=gaussians", "student=mlp", "evaluation=classification"], "objective", "objective=ce"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_spent(
    change: list[str], key: str, remedy: str, kdrun: Callable[..., Outcome], tmp_path: Any
) -> None:
    drop = {word[1:] for word in change if word.startswith("~")}
    words = [word for word in GROUPS if word.partition("=")[0] not in drop] + [word for word in change if not word.startswith("~")]
    refused = kdrun("train", *words, f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert f"\n{key}: " in refused.err
    assert remedy in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [{"clip_low": 0}, {"clip_high": -1}, {"temperature": 0}, {"reduction": "mean"}])
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        make("grpo", **values)
