"""MiniLLM: its gradient is that of the sequence-level reverse KL; the numbers of its returns; what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.losses.token import reverse_kl
from kdrun.objective.minillm import RETURN, MiniLLM
from kdrun.source.rollout import BEHAVIOUR
from kdrun.student.weights import save_student
from kdrun.types import Batch
from tests.conftest import Outcome
from tests.dataset.texts import V, alone, batch_of, samples, tiny
from tests.engine.running import assert_same_run, assert_same_training, resume, run, run_killed
from tests.objective.spoken import Said, Step, ready, scored
from tests.objective.test_grpo import pieces
from tests.objective.toy import make
from tests.source.test_rollout import group, policy, rows, uneven

TOKENS, LENGTH, EOS = 3, 3, 2
OFF = {"length_norm": False, "clip": None, "reduction": "seq_sum"}  # the equation itself


class Table(nn.Module):
    """Logits of their own after every text so far."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(sum(TOKENS**n for n in range(LENGTH)), TOKENS, generator=g, dtype=torch.float64))
        self.vocabulary = TOKENS

    def forward(self, x: Tensor) -> Tensor:
        place = torch.zeros_like(x)
        for t in range(1, x.shape[1]):
            place[:, t] = TOKENS * place[:, t - 1] + x[:, t] + 1
        return self.logits[place]


def texts(ends: bool) -> list[tuple[int, ...]]:
    """All that can be written: of LENGTH tokens, or up to the first EOS."""
    every = list(itertools.product(range(TOKENS), repeat=LENGTH))
    return sorted({y[: y.index(EOS) + 1] if ends and EOS in y else y for y in every})


def read(y: Sequence[int]) -> Batch:
    """A text after an empty prompt."""
    whole = torch.tensor([[0, *y[:-1], *[0] * (LENGTH - len(y))]])
    return scored((1, LENGTH), torch.tensor([[*y, *[-1] * (LENGTH - len(y))]]))._replace(inputs=whole)


def log_probs(network: nn.Module, batch: Batch) -> Tensor:
    said = torch.log_softmax(network(batch.inputs), -1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(batch.targets >= 0, said, 0.0)


def drawn(y: Sequence[int], student: nn.Module, teacher: nn.Module, mixture: float = 0.0) -> Batch:
    """That text with the probabilities that it is drawn with."""
    batch = read(y)
    q, p = (log_probs(network, batch).detach().exp() for network in (student, teacher))
    told = torch.where(batch.targets >= 0, (mixture * p + (1 - mixture) * q).log(), 0.0)
    return batch._replace(extra={BEHAVIOUR: told})


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("how", [{}, {"single_step": False, "present": True}])
def test_the_expected_gradient_is_that_of_the_reverse_kl_between_sequences(how: dict[str, Any], ends: bool) -> None:
    """By enumeration; with the stabilisers off."""
    student, teacher = Table(0), Table(1)
    objective = ready("minillm", student, teacher, classes=TOKENS, **OFF, **how)
    expected, total, mass = torch.zeros_like(student.logits), torch.zeros((), dtype=torch.float64), 0.0
    for y in texts(ends):
        batch = drawn(y, student, teacher)
        log_q, log_p = log_probs(student, batch).sum(), log_probs(teacher, batch).sum()
        expected += log_q.exp().item() * Step(objective, student, teacher, [batch]).gradient[0]
        total, mass = total + log_q.exp() * (log_q - log_p), mass + log_q.exp().item()
    assert mass == pytest.approx(1, abs=1e-12)
    (exact,) = torch.autograd.grad(total, student.parameters())
    torch.testing.assert_close(expected, exact, rtol=1e-6, atol=1e-9)  # rows of weights are float32
    assert exact.abs().max() > 0.05


def test_a_step_without_what_comes_after_it_is_not_enough() -> None:
    """The reverse KL token by token, which on-policy distillation takes, has another gradient."""
    student, teacher = Table(0), Table(1)
    per_token = ready("reverse_kl", student, teacher, classes=TOKENS, reduction="seq_sum")
    whole = ready("minillm", student, teacher, classes=TOKENS, **OFF)
    gap = torch.zeros_like(student.logits)
    for y in texts(False):
        batch = drawn(y, student, teacher)
        weight = log_probs(student, batch).sum().exp().item()
        gap += weight * (Step(whole, student, teacher, [batch]).gradient[0] - Step(per_token, student, teacher, [batch]).gradient[0])
    assert gap.abs().max() > 0.01


def test_importance_weights_make_a_mixture_right() -> None:
    """At one token, where the weight of the token is that of the text: drawn from .2 p + .8 q, the gradient in the mean is that of q."""
    zs, zt = torch.tensor([0.0, 1, 0.5, 0], dtype=torch.float64), torch.tensor([2.0, 1, 0, -1], dtype=torch.float64)
    p, q = zt.softmax(-1), zs.softmax(-1)
    mixed = 0.2 * p + 0.8 * q
    student, teacher = Said(zs[None, None].clone()), Said(zt[None, None].clone())
    objective = ready("minillm", student, teacher, classes=4, **OFF, single_step=False, present=True)
    expected = torch.zeros(4, dtype=torch.float64)
    for y in range(4):
        batch = scored((1, 1), torch.tensor([[y]]))._replace(extra={BEHAVIOUR: mixed[y].log().view(1, 1)})
        expected += mixed[y] * Step(objective, student, teacher, [batch]).gradient[0].flatten()
    assert expected.tolist() == pytest.approx([-0.309787, 0.011777, 0.136617, 0.161392], abs=1e-6)


class Rewarded(nn.Module):
    """Two networks over V tokens whose log-probabilities of token 0 differ by given rewards."""

    def __init__(self, rewards: Sequence[float]) -> None:
        super().__init__()
        q = torch.full((len(rewards), 2), 0.5, dtype=torch.float64)
        p = torch.stack([0.5 * torch.tensor(rewards, dtype=torch.float64).exp(), torch.zeros(len(rewards))], 1)
        p[:, 1] = 1 - p[:, 0]
        self.student, self.teacher = Said(q.log()[None]), Said(p.log()[None])


def returned(rewards: Sequence[float], **values: Any) -> list[float]:
    """A of every token of a text with these rewards, read off the gradient of its log-probability at ratio 1."""
    nets = Rewarded(rewards)
    batch = scored((1, len(rewards)))._replace(extra={BEHAVIOUR: torch.full((1, len(rewards)), math.log(0.5), dtype=torch.float64)})
    objective = ready("minillm", nets.student, nets.teacher, classes=2, single_step=False, present=True, reduction="seq_sum", **values)
    # d -A log q_0 / d z_0 = -A (1 - q_0) = -A / 2
    return [-2 * g for g in Step(objective, nets.student, nets.teacher, [batch]).gradient[0][0, :, 0].tolist()]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"length_norm": False}, [0.5, 0.3, 0.4]),
        ({}, [0.166667, 0.15, 0.4]),
        ({"length_norm": False, "gamma": 0.95}, [0.466, 0.28, 0.4]),
        ({"gamma": 0.95}, [0.155333, 0.14, 0.4]),
        ({"gamma": 0.95, "reward_scale": 0.5, "reward_bound": 100.0}, [0.310667, 0.28, 0.8]),  # public code, before it whitens
        ({"length_norm": False, "reward_bound": 0.3}, [0.4, 0.2, 0.3]),
    ],
)
def test_returns_of_the_example(values: dict[str, Any], expected: list[float]) -> None:
    assert returned([0.2, -0.1, 0.4], **values) == pytest.approx(expected, abs=2e-6)


def test_the_rest_begins_with_the_next_token_and_is_divided_by_how_many_are_left() -> None:
    objective = make("minillm")
    assert isinstance(objective, MiniLLM)
    batch = scored((1, 4), torch.tensor([[-1, 0, 0, 0]]))._replace(extra={BEHAVIOUR: torch.zeros(1, 4)})
    rewards = torch.tensor([[9.0, 0.2, -0.1, 0.4]], dtype=torch.float64)
    found = objective.beforehand(batch, lambda loss, kinds: rewards).extra[RETURN]
    assert found.flatten().tolist() == pytest.approx([0, 0.15, 0.4, 0])


@pytest.mark.parametrize(("rho", "advantage", "value"), [(1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5), (0.5, -1.0, 0.8)])
def test_ratio_times_weight_is_clipped_at_a_fifth(rho: float, advantage: float, value: float) -> None:
    objective = make("minillm")
    assert isinstance(objective, MiniLLM)
    logits = torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64)
    behaviour = logits.log_softmax(-1)[:, 1] - math.log(rho)
    found = objective._policy(logits, torch.tensor([1]), behaviour, torch.tensor([advantage], dtype=torch.float64))
    assert found.item() == pytest.approx(value, abs=1e-12)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    student = tiny()
    (batch,) = group(uneven(), student, batch_size=9)
    step = Step(ready("minillm", student, tiny()), student, tiny(), [batch])
    assert step.values["single"] == pytest.approx(0, abs=1e-9)
    assert all(g.abs().max() < 1e-9 for g in step.gradient)


def test_the_exact_term_is_the_reverse_kl_of_every_token() -> None:
    student, teacher = tiny(), tiny("gpt2")
    (batch,) = group(uneven(), student, batch_size=9)
    step = Step(ready("minillm", student, teacher), student, teacher, [batch])
    with torch.no_grad():
        said, theirs = (net(batch.inputs, position_ids=batch.extra["position_ids"]).logits[..., :V] for net in (student, teacher))
    keep = batch.targets >= 0
    assert step.values["single"] == pytest.approx(reverse_kl(said[keep], theirs[keep]).mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    "values", [{}, {"length_norm": False, "reduction": "seq_sum"}, {"gamma": 0.95, "present": True, "temperature": 0.8}]
)
def test_any_split_and_chunks_give_one_gradient(values: dict[str, Any]) -> None:
    student, teacher = tiny(), tiny("gpt2")
    (batch,) = group(uneven(), student, teacher=teacher, batch_size=8, writer="mixture", mixture=0.4)
    whole = Step(ready("minillm", student, teacher, projection="whole", **values), student, teacher, [batch])
    assert max(g.abs().max() for g in whole.gradient) > 1e-4
    for projection in ("whole", "chunked"):
        objective = ready("minillm", student, teacher, projection=projection, **values)
        cut = Step(objective, student, teacher, pieces(batch, [3, 1, 4]))
        torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-9, atol=1e-12)
        for mine, other in zip(cut.gradient, whole.gradient, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-10)


def test_texts_of_a_mixture_come_with_its_probabilities() -> None:
    student, teacher = tiny(), tiny("gpt2", seed=3)
    (batch,) = group(uneven(), student, teacher=teacher, batch_size=9, writer="mixture", mixture=0.3)
    with torch.no_grad():
        q, p = (net(batch.inputs, position_ids=batch.extra["position_ids"]).logits[..., :V].softmax(-1) for net in (student, teacher))
    expected = (0.3 * p + 0.7 * q).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0].log()
    keep = batch.targets >= 0
    torch.testing.assert_close(batch.extra[BEHAVIOUR][keep].double(), expected[keep], rtol=0, atol=1e-5)
    assert rows([batch]) != rows(group(uneven(), student, batch_size=9))


def test_given_texts_are_learned_by_heart() -> None:
    student, teacher, batch = tiny(), tiny("gpt2"), batch_of(alone(samples([5, 9, 3])))
    step = Step(ready("minillm", student, teacher, lm_weight=0.5), student, teacher, [batch])
    plain = Step(ready("sft", student, None), student, None, [batch])
    assert step.values.keys() == {"lm"}
    assert step.loss.item() == pytest.approx(0.5 * plain.loss.item(), rel=1e-12)


@pytest.mark.parametrize(
    "values",
    [{"clip": 0}, {"gamma": 1.1}, {"reward_scale": 0}, {"reward_bound": -1}, {"lm_weight": -1}, {"temperature": 0}, {"single_step": False}],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        make("minillm", **values)


# -- whole runs and refusals ----------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    save_student(policy(7), tmp_path / "base.safetensors")
    return [
        "dataset=sums", "dataset.n_train=33", "dataset.n_test=10", "teacher=sum_policy", "student=sum_policy", "objective=minillm",
        f"teacher.checkpoint={tmp_path / 'base.safetensors'}", "source=rollout", "source.writer=mixture", "source.batch_size=11",
        "source.max_new_tokens=6", "optim=adamw", "optim.lr=0.01", "optim.epochs=2", "evaluation=generation",
        "evaluation.max_new_tokens=6", "hardware=cpu", "hardware.threads=1", "run.log_every=1",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["source.share=0.5"]])
def test_runs_are_resumed_to_the_same_bytes_and_cut_to_the_same_gradients(more: list[str], words: list[str], tmp_path: Path) -> None:
    words = [*words, *more, "run.checkpoint_every=0.34"]
    run(words, tmp_path / "unbroken")
    run_killed(words, tmp_path / "broken", "step_done", 4)
    resume(words, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    run([*words, "hardware.micro_batch=4"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "unbroken", rtol=1e-4)


NAMED = {
    "minillm": [],
    "grpo": ["objective=grpo", "source.per_prompt=2", "source.writer=student"],
    "sampled": ["objective=opsd", "objective.divergence=sampled_token", "source.writer=student"],
}


@pytest.mark.parametrize("objective", NAMED)
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("source.top_p=0.9", "source.top_p"),
        ("source.top_k=5", "source.top_k"),
        ("source.temperature=0.8", "objective.temperature"),
        ("source.writer=teacher", "source.writer"),
        ("source.replay=true", "source.replay"),
    ],
)
def test_texts_that_are_not_drawn_from_the_student_are_refused(
    objective: str, change: str, key: str, words: list[str], kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    refused = kdrun("train", *words, *NAMED[objective], change, f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert f"\n{key}: " in refused.err, refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", [[], NAMED["sampled"][:2]])
def test_given_texts_alone_are_refused(objective: list[str], words: list[str], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    plain = [word for word in words if not word.startswith(("source.m", "source.w"))]
    refused = kdrun("train", *plain, *objective, "source=loader", f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert "\nsource: " in refused.err
    assert "source=rollout" in refused.err


def test_given_texts_among_the_written_need_a_weight(words: list[str], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    refused = kdrun("train", *words, "source.share=0.5", "objective.lm_weight=0", f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert "\nsource.share: " in refused.err
