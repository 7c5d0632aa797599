"""TAID (ICLR 2025): the target, the controller, and runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrun.engine.records import SUMMARY, read_json
from kdrun.objective._language import COUNT, SUM
from kdrun.objective.taid import TAID
from kdrun.types import Progress
from tests.conftest import Outcome
from tests.dataset.texts import alone, batch_of, samples, tiny, uneven_run
from tests.engine.running import assert_bit_equal, assert_same_run, assert_same_training, run, run_killed, training_lines, weights
from tests.engine.test_ranks import assert_ranks_change_nothing
from tests.objective.spoken import Said, Step, ready, scored

examples = settings(derandomize=True, max_examples=60, deadline=None)
ZT, ZS = [2.0, 1, 0, -1], [0, 1, 0.5, 0]
Q, P = [0.157060, 0.426933, 0.258948, 0.157060], [0.643914, 0.236883, 0.087144, 0.032059]
QUICK = ["objective=taid", "objective.alpha=1", "objective.beta=0.5"]  # six steps: alpha N is 6


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture
def uneven(tmp_path: Path) -> list[str]:
    return uneven_run(tmp_path / "teacher.safetensors")


def at(t: float, zs: Tensor, zt: Tensor, name: str = "taid-kl", **values: Any) -> Step:
    """The step of the example at that t; logits [B, T, V]."""
    student, teacher = Said(zs.clone()), Said(zt.clone())
    objective = ready(name, student, teacher, classes=zs.shape[-1], **values)
    if name.startswith("taid"):
        objective.state["t"].fill_(t)
    return Step(objective, student, teacher, [scored((zs.shape[0], zs.shape[1]))])


def example(t: float, **values: Any) -> Step:
    return at(t, *(torch.tensor(z, dtype=torch.float64).view(1, 1, 4) for z in (ZS, ZT)), **values)


def controlled(steps: int = 20000, **values: Any) -> TAID:
    """An objective of so many steps that has a controller and no networks."""
    return ready("taid", Said(torch.zeros(1, 1, 2)), Said(torch.zeros(1, 1, 2)), steps=steps, **values)  # type: ignore[no-any-return]


def t_of(objective: TAID) -> float:
    return objective.report()["taid_t"]


def move(objective: TAID, *losses: float, done: int = 0) -> list[float]:
    """t after each of these losses, those of the steps from `done` on."""
    found = []
    for n, loss in enumerate(losses):
        objective.move(torch.tensor(loss, dtype=torch.float64), done + n)
        found.append(t_of(objective))
    return found


def random_logits(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    zs, zt = (2 * torch.randn(2, 3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return zs, zt


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_values_and_gradient_of_the_example() -> None:
    step = example(0.4)
    assert step.loss.item() == pytest.approx(0.088768, abs=1e-6)
    assert example(0.4, name="taid-ce").loss.item() == pytest.approx(1.363879, abs=1e-6)
    gradient = step.gradient[0].flatten()
    assert gradient.tolist() == pytest.approx([-0.162518, 0.036599, 0.065114, 0.060805], abs=1e-6)
    q = torch.tensor(ZS, dtype=torch.float64).softmax(0)
    assert q.tolist() == pytest.approx(Q, abs=1e-6)
    assert (q - gradient).tolist() == pytest.approx([0.319578, 0.390333, 0.193834, 0.096255], abs=1e-6)  # p_t
    assert example(1.0).loss.item() == pytest.approx(0.623137, abs=1e-6)


def test_at_one_the_gradient_is_forward_kl_s_and_at_zero_there_is_none() -> None:
    expected = [a - b for a, b in zip(Q, P, strict=True)]
    assert example(1.0).gradient[0].flatten().tolist() == pytest.approx(expected, abs=2e-6)
    still = example(0.0)
    assert still.loss == 0
    assert (still.gradient[0] == 0).all()


@examples
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["taid-kl", "taid-ce"]))
def test_gradient_is_q_minus_the_target_over_the_number_of_tokens(seed: int, t: float, name: str) -> None:
    zs, zt = random_logits(seed)
    step = at(t, zs, zt, name)
    target = ((1 - t) * zs + t * zt).softmax(-1)
    torch.testing.assert_close(step.gradient[0], (zs.softmax(-1) - target) / 6, rtol=1e-9, atol=1e-12)


@examples
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_target_is_the_geometric_mixture(seed: int, t: float) -> None:
    zs, zt = random_logits(seed)
    mixed = zs.softmax(-1) ** (1 - t) * zt.softmax(-1) ** t
    target = zs.softmax(-1) - 6 * at(t, zs, zt).gradient[0]
    torch.testing.assert_close(target, mixed / mixed.sum(-1, keepdim=True), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["taid-kl", "taid-ce"])
def test_a_constant_added_to_the_logits_of_a_position_changes_nothing(name: str) -> None:
    zs, zt = random_logits(0)
    shift = 10 * torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = at(0.3, zs, zt, name)
    for other in (at(0.3, zs + shift, zt, name), at(0.3, zs, zt + shift, name)):
        torch.testing.assert_close(other.loss, step.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.gradient, step.gradient, rtol=1e-9, atol=1e-12)


def test_the_two_values_differ_by_the_entropy_of_the_target_and_teach_the_same() -> None:
    zs, zt = random_logits(0)
    kl, ce = at(0.3, zs, zt, "taid-kl"), at(0.3, zs, zt, "taid-ce")
    log_p = (0.7 * zs + 0.3 * zt).log_softmax(-1)
    torch.testing.assert_close(ce.loss - kl.loss, -(log_p.exp() * log_p).sum(-1).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(ce.gradient, kl.gradient, rtol=1e-9, atol=1e-12)


def test_only_scored_tokens_count() -> None:
    zs, zt = random_logits(0)
    targets = torch.tensor([[-1, 1, 2], [3, -1, -1]])
    student, teacher = Said(zs), Said(zt)
    objective = ready("taid-kl", student, teacher, classes=6)
    step = Step(objective, student, teacher, [scored((2, 3), targets)])
    assert (step.gradient[0][targets < 0] == 0).all()
    rows = zs[targets >= 0][None], zt[targets >= 0][None]
    alone_ = at(objective.t_start, *rows)
    torch.testing.assert_close(step.loss, alone_.loss, rtol=1e-12, atol=0)
    assert step.kept[COUNT].tolist() == [2, 1]


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_tokens_that_a_model_masks_are_out_of_the_target(t: float) -> None:
    zs, zt = random_logits(0)
    zt[..., 5] = -torch.inf
    step = at(t, zs, zt)
    assert step.loss.isfinite()
    assert step.gradient[0].isfinite().all()
    target = zs.softmax(-1) - 6 * step.gradient[0]
    assert target[..., 5].abs().max() < 1e-12


# -- the controller ---------------------------------------------------------------------------------------------------


def test_numbers_of_the_controller() -> None:
    objective = controlled(t_start=0.4, alpha=5e-4, beta=0.99)
    objective.state["previous"].fill_(1.0)
    (t,) = move(objective, 0.9, done=1)
    assert objective.state["momentum"].item() == pytest.approx(0.001, abs=1e-12)  # 0.01 of delta 0.1
    assert t - 0.4 == pytest.approx(1.50075e-4, abs=1e-11)
    assert t == pytest.approx(0.400150075, abs=1e-9)
    (after,) = move(objective, 0.95, done=2)
    assert objective.state["momentum"].item() == pytest.approx(4.3444e-4, abs=1e-8)
    assert after - t == pytest.approx(1.499951e-4, abs=1e-10)
    assert after == pytest.approx(0.400300070, abs=1e-9)


def test_with_few_steps_the_floor_wins() -> None:
    objective = controlled(steps=1000, t_start=0.4, alpha=5e-4, beta=0.99)
    objective.state["previous"].fill_(1.0)
    assert move(objective, 0.9, done=1) == [pytest.approx(0.4006, abs=1e-12)]


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_first_call_only_stores(adaptive: bool) -> None:
    objective = controlled(adaptive=adaptive)
    assert move(objective, 1.25) == [0.4]
    assert objective.state["previous"] == 1.25
    assert objective.state["momentum"] == 0


@examples
@given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=30), st.floats(0, 1), st.floats(0, 1), st.floats(0, 5), st.floats(0, 0.999))
def test_t_never_falls_and_stays_between_the_floor_and_its_end(
    losses: list[float], start: float, end: float, alpha: float, beta: float
) -> None:
    start, end = sorted((start, end))
    objective = controlled(steps=len(losses), t_start=start, t_end=end, alpha=alpha, beta=beta)
    path = [start, *move(objective, *losses)]
    assert all(a <= b for a, b in pairwise(path))
    assert path[-1] <= end
    floors = [start + (end - start) * n / len(losses) for n in range(len(losses))]
    assert all(t >= min(floor, end) - 1e-15 for t, floor in zip(path[1:], floors, strict=True))
    assert path[-1] >= end - (end - start) / len(losses) - 1e-12  # the last call of a training has n = N - 1
    assert move(objective, losses[-1], done=len(losses))[-1] == pytest.approx(end, abs=1e-15)


@examples
@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0, 0.99), st.floats(1e-6, 0.1), st.floats(0, 0.99))
def test_a_step_forward_is_less_than_alpha_times_what_is_left(before: float, now: float, t: float, alpha: float, beta: float) -> None:
    """Also while the loss rises t moves forward."""
    objective = controlled(steps=10**9, t_start=t, alpha=alpha, beta=beta)
    objective.state["previous"].fill_(before)
    step = move(objective, now, done=0)[0] - t
    # A loss that is a hundred times as large underflows no sigmoid as long as the momentum keeps most of it away.
    share = torch.sigmoid(torch.tensor((1 - beta) * (before - now) / before, dtype=torch.float64)).item()
    assert step == pytest.approx(alpha * share * (1 - t), abs=1e-15)
    assert 0 <= step < alpha * (1 - t)


def test_a_rising_loss_moves_t_forward() -> None:
    objective = controlled(steps=10**6)
    path = move(objective, 1.0, 1.5, 2.0, 3.0)
    assert path[0] < path[1] < path[2] < path[3]
    assert path[3] - path[0] > 4e-4 * 0.6 * 3 / 4  # each about alpha sigmoid(m) (1 - t), m a little below 0


def test_without_adaptation_t_is_the_linear_ramp() -> None:
    objective = controlled(steps=10, adaptive=False, t_start=0.2, t_end=0.9)
    path = move(objective, *[1.0, 5.0, 0.1] * 3, 1.0)
    assert path == pytest.approx([0.2 + 0.7 * n / 10 for n in range(10)], abs=1e-12)


def test_the_controller_hears_the_mean_over_all_tokens_of_the_step() -> None:
    """Micro-batches of different token counts: a mean of means would be another J."""
    student, teacher, rows = tiny("llama"), tiny("gpt2", seed=7), alone(samples([4, 9, 3, 11]))
    heard = []
    for cuts in ([[0, 1, 2, 3]], [[0], [1, 2], [3]]):
        objective = ready("taid-ce", student, teacher)
        step = Step(objective, student, teacher, [batch_of(rows, index=torch.tensor(cut)) for cut in cuts])
        objective.after_step(step.ids, step.kept, Progress(0, 30, 3))
        heard.append(objective.state["previous"].item())
        assert heard[-1] == pytest.approx(step.loss.item(), rel=1e-6)
    assert heard[0] == pytest.approx(heard[1], rel=1e-7)


def test_a_step_without_a_scored_token_does_not_stop_the_controller() -> None:
    objective = controlled(steps=10**6)
    move(objective, 1.0, 0.9)
    none = {SUM: torch.zeros(3), COUNT: torch.zeros(3, dtype=torch.int64)}
    before = t_of(objective)
    objective.after_step(torch.arange(3), none, Progress(2, 10**6, 10))
    assert objective.state["previous"] == 0.9
    after = move(objective, 0.88, done=3)[0]
    assert after - before > 1.5e-4 * 1.9  # two steps forward


def test_state_moves_only_in_after_step() -> None:
    student, teacher, batch = tiny("llama"), tiny("gpt2", seed=7), batch_of(alone(samples([4, 9])))
    objective = ready("taid", student, teacher)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    Step(objective, student, teacher, [batch])
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


def test_state_round_trip_gives_the_same_path() -> None:
    one, other = controlled(), controlled()
    move(one, 1.0, 0.8, 0.9)
    other.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    assert move(one, 0.7, 0.6, done=3) == move(other, 0.7, 0.6, done=3)


def test_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"t_start=0.9: legal range \[0, t_end=0.5\]"):
        TAID(t_start=0.9, t_end=0.5)
    with pytest.raises(ValueError, match="t_start=0 with value=kl"):
        TAID(t_start=0.0, value="kl")
    with pytest.raises(ValueError, match="legal values ce, kl"):
        TAID(value="mse")  # type: ignore[arg-type]
    assert TAID(t_start=0.0).t_start == 0
    assert TAID(t_start=0.0, value="kl", adaptive=False).t_start == 0
    assert TAID(t_start=1.0).t_start == 1


def test_the_kl_value_cannot_begin_at_zero_because_the_controller_would_not_recover() -> None:
    objective = controlled(steps=10**6, t_start=0.0)
    path = move(objective, 0.0, 0.5, *[0.4] * 100)
    assert path[-1] < 1.1 * 101 / 10**6  # the floor and nothing more


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_from_one_to_one_it_trains_what_forward_kl_trains(adaptive: str, uneven: list[str], tmp_path: Path) -> None:
    still = ["objective.t_start=1", "objective.t_end=1", "objective.value=kl", f"objective.adaptive={adaptive}"]
    run([*uneven, "objective=taid", *still], tmp_path / "taid")
    run([*uneven, "objective=lm_kd"], tmp_path / "kl")
    assert_bit_equal(weights(tmp_path / "taid"), weights(tmp_path / "kl"))
    ours, theirs = (training_lines(tmp_path / folder) for folder in ("taid", "kl"))
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_killed_in_the_middle_is_resumed_to_the_same_bytes(
    step: int, uneven: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*uneven, *QUICK, "run.checkpoint_every=0.6"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_t_is_reported_and_moves_faster_than_the_ramp(uneven: list[str], tmp_path: Path) -> None:
    """Over uneven micro-batches as over the whole batch."""
    ends = {}
    for folder, more in (("whole", []), ("cut", ["hardware.micro_batch=[6,1,4]"]), ("linear", ["objective.adaptive=false"])):
        ends[folder] = run([*uneven, *QUICK, *more], tmp_path / folder)["test"]["taid_t"]
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    assert ends["cut"] == pytest.approx(ends["whole"], rel=1e-6)
    assert ends["linear"] == pytest.approx(0.4 + 0.6 * 5 / 6)
    assert 1 > ends["whole"] > ends["linear"] + 0.01


@pytest.mark.parametrize("projection", ["whole", pytest.param("chunked", marks=pytest.mark.slow)])
def test_two_ranks_train_what_one_process_trains(projection: str, uneven: list[str], tmp_path: Path) -> None:
    """11 texts are 6 and 5 for two ranks, and as many tokens as they happen to have; the controller of both hears the same J."""
    base = [*uneven, *QUICK, f"objective.projection={projection}"]
    assert_ranks_change_nothing(base, [], tmp_path)
    ends = [read_json(tmp_path / folder / SUMMARY)["test"]["taid_t"] for folder in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_the_bench_in_small_is_resumed_to_the_same_bytes(tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    """The recipe itself, with its teacher trained first; a checkpoint in every epoch."""
    small = ["dataset.n_train=60", "dataset.n_test=20", "source.batch_size=13", "teacher.fit.optim.epochs=1", "optim.steps=12"]
    base = ["recipe=taid_bench", "run.rivals=false", "run.seeds=null", "run.log_every=1", "run.checkpoint_every=1", *small]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 9)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
