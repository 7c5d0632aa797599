"""PS-KD (ICCV 2021): the target, its schedule, its memory, and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrun.dataset.gaussians import GaussianData
from kdrun.objective.base import Objective
from kdrun.objective.ps_kd import PSKD
from kdrun.source.loader import Loader
from kdrun.types import Batch, Context, ModelSpec, Output, Progress, Signal
from tests.conftest import Outcome
from tests.engine.running import assert_bit_equal, assert_same_run, assert_same_training, run, run_killed, training_lines, weights
from tests.objective.toy import make

examples = settings(derandomize=True, max_examples=60, deadline=None)
PSKD_RUNS = {
    "table": ["objective=ps_kd"],
    "half": ["objective=ps_kd", "objective.table_dtype=fp16"],
    "cpu": ["objective=ps_kd", "objective.table_on=cpu"],
    "snapshot": ["objective=ps_kd", "objective.memory=model", "teacher=snapshot"],
    "ema": ["objective=ps_kd", "objective.memory=model", "teacher=ema", "teacher.decay=0.8"],
}


def at(epoch: int, epochs: int = 10, steps: int = 3) -> Progress:
    """The first step of an epoch, which counts from 1."""
    return Progress((epoch - 1) * steps, epochs * steps, steps)


def loss_of(objective: Objective, logits: Tensor, past: Tensor, y: Tensor, progress: Progress) -> Tensor:
    """The loss of a step in which the table has `past` [B, C]."""
    ids = torch.arange(len(y))
    batch = Batch(logits, y, ids, ids, {"past": past})
    terms = objective.terms(Output(logits, {}, {}), Signal(None, {}), batch, "student", nn.ModuleDict())
    weight = objective.weights(progress)
    return torch.stack([weight[name] * term.sum / len(y) for name, term in terms.items()]).sum()


def constant(alpha: float) -> Objective:
    return make("ps_kd", alpha_T=alpha, schedule="constant")


def gradient(alpha: float, logits: Tensor, past: Tensor, y: int) -> Tensor:
    """d loss / d logits of one sample [C]; the labels' alone at alpha 0."""
    z = logits.clone().requires_grad_()
    loss_of(constant(alpha), z[None], past[None], torch.tensor([y]), at(2)).backward()
    assert z.grad is not None
    return z.grad


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_value_and_gradient_of_the_first_example() -> None:
    logits, past = numbers(0.5, 0.3, 0.2).log(), numbers(0.7, 0.2, 0.1)
    assert loss_of(constant(0.5), logits[None], past[None], torch.tensor([0]), at(2)).item() == pytest.approx(0.790044, abs=1e-6)
    found = gradient(0.5, logits, past, 0)
    torch.testing.assert_close(found, numbers(-0.35, 0.2, 0.15), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.softmax(0) - found, numbers(0.85, 0.1, 0.05), rtol=0, atol=1e-12)  # r
    assert (found.abs().sum() / gradient(0, logits, past, 0).abs().sum()).item() == pytest.approx(1 - 0.5 * 0.3 / 0.5, abs=1e-12)


def test_value_and_gradient_of_the_second_example() -> None:
    logits, past = numbers(0.8, 0.15, 0.05).log(), numbers(0.6, 0.3, 0.1)
    torch.testing.assert_close(gradient(0.5, logits, past, 0), numbers(0, 0, 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(0, logits, past, 0), numbers(-0.2, 0.15, 0.05), rtol=0, atol=1e-12)


def test_alpha_of_the_published_schedule() -> None:
    objective = PSKD()
    assert [objective.alpha(at(t + 1, 300, 391)) for t in (0, 149, 299)] == pytest.approx([0.0026667, 0.4, 0.8], abs=1e-6)
    assert objective.alpha(Progress(300 * 391 - 1, 300 * 391, 391)) == pytest.approx(0.8)  # to the last step
    assert PSKD(schedule="constant").alpha(at(2, 300, 391)) == 0.8


@examples
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_target_is_a_distribution_and_the_gradient_sums_to_zero(seed: int, alpha: float) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, past = (2 * torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    found = gradient(alpha, logits, past.softmax(0), int(torch.randint(6, (1,), generator=g)))
    target = logits.softmax(0) - found
    assert abs(found.sum().item()) < 1e-12
    assert target.sum().item() == pytest.approx(1, abs=1e-12)
    assert target.min().item() >= -1e-12


@examples
@given(st.integers(0, 10**6), st.floats(0.05, 0.9))
def test_gradient_is_rescaled_by_how_much_the_confidence_rose(seed: int, alpha: float) -> None:
    """Sec. 3.2: relative to labels alone, 1 - alpha (1 - P_g) / (1 - p_g), where no class is pushed to the other side."""
    g = torch.Generator().manual_seed(seed)
    p, past = (torch.randn(5, generator=g, dtype=torch.float64).softmax(0) for _ in range(2))
    others = [c for c in range(5) if c != 2]
    if bool((p[others] >= alpha * past[others]).all()):
        ratio = gradient(alpha, p.log(), past, 2).abs().sum() / gradient(0, p.log(), past, 2).abs().sum()
        rho = 1 - alpha * (1 - past[2]) / (1 - p[2])
        assert ratio.item() == pytest.approx(rho.item(), abs=1e-10)
        assert (rho < 1 - alpha) == (p[2] > past[2])


def test_a_past_equal_to_the_label_is_cross_entropy_and_a_uniform_one_label_smoothing() -> None:
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 5, generator=g, dtype=torch.float64), torch.tensor([0, 3, 3, 1])
    objective, onehot = PSKD(), nn.functional.one_hot(y, 5).double()
    for epoch in (2, 5, 10):
        alpha = objective.alpha(at(epoch))
        plain, smooth = (nn.functional.cross_entropy(z, y, label_smoothing=e).item() for e in (0.0, alpha))
        assert loss_of(objective, z, onehot, y, at(epoch)).item() == pytest.approx(plain, abs=1e-12)
        assert loss_of(objective, z, torch.full_like(z, 0.2), y, at(epoch)).item() == pytest.approx(smooth, abs=1e-12)


def test_the_first_epoch_has_no_past() -> None:
    objective = PSKD()
    objective.setup(context(GaussianData(n_train=20, classes=4, superclasses=2).load().labels_by_id(), 4))
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([0, 0]), {})
    assert objective.weights(at(1)) == {"ce": 1.0, "past": 0.0}
    assert objective.prepare(batch, at(1)) is batch
    assert objective.prepare(batch, at(2)).extra["past"].shape == (2, 4)


def context(labels: Tensor, classes: int) -> Context:
    return Context(ModelSpec(classes, (32,)), None, classes, labels, 0, steps_per_epoch=3, total_steps=30)


def after_an_epoch(seed: int, network: Callable[[Tensor], Tensor], objective: Any) -> tuple[Any, list[Tensor]]:
    """The objective's state moved by an epoch of a network that does not learn, in the order of that seed; and the ids of every step."""
    data = GaussianData(classes=4, superclasses=2, n_train=50, n_test=10).load()
    objective.setup(context(data.labels_by_id(), 4))
    source, seen = Loader(batch_size=16).open(data, seed=seed), []
    for step in range(source.steps_per_epoch):
        (batch,) = source.group(step)
        output = Output(network(batch.inputs), {}, {})
        objective.terms(output, Signal(None, {}), objective.prepare(batch, at(1)), "student", nn.ModuleDict())
        objective.after_step(batch.ids, output.keep, at(1))
        seen.append(batch.ids)
    return data, seen


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_after_an_epoch_the_table_has_each_sample_s_prediction_in_any_order(dtype: str) -> None:
    torch.manual_seed(0)
    network = nn.Linear(32, 4)
    tables = []
    for seed in (1, 2):
        objective = make("ps_kd", table_dtype=dtype)
        data, seen = after_an_epoch(seed, network, objective)
        assert torch.cat(seen).sort().values.tolist() == list(range(50))  # each id is written once
        train = data.rows("train", torch.arange(50), torch.zeros(50, dtype=torch.int64), seed=0, augment=False)
        tables.append(objective.state_dict()["table"].float())
        tolerance = 1e-6 if dtype == "fp32" else 1e-3
        torch.testing.assert_close(tables[-1], network(train.inputs).softmax(1).detach(), rtol=0, atol=tolerance)
        (first,) = Loader(batch_size=5).open(data, seed=7).group(0)[:1]
        assert torch.equal(objective.prepare(first, at(2)).extra["past"], tables[-1][first.ids])
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-6)


def test_with_batchnorm_the_table_has_what_the_training_batch_gave() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    objective = make("ps_kd")
    data, seen = after_an_epoch(1, network, objective)
    batch = Loader(batch_size=16).open(data, seed=1).group(0)[0]
    assert torch.equal(batch.ids, seen[0])
    assert torch.equal(objective.state_dict()["table"][batch.ids], network(batch.inputs).softmax(1).detach())


def test_a_sample_that_was_not_seen_keeps_its_label() -> None:
    objective = make("ps_kd")
    labels = torch.tensor([2, -1, 0, 1])  # id 1 is of another split
    objective.setup(context(labels, 3))
    assert objective.state_dict()["table"].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    batch = Batch(torch.zeros(1, 1), torch.tensor([1]), torch.tensor([3]), torch.tensor([1]), {})
    assert objective.prepare(batch, at(2)).extra["past"].tolist() == [[0, 1, 0]]


def test_a_state_of_other_data_is_refused() -> None:
    objective = make("ps_kd")
    objective.setup(context(torch.tensor([0, 1, 2]), 3))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(2, 3\)"):
        objective.load_state_dict({"table": torch.zeros(2, 3)})


def test_an_unknown_memory_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="legal values table, model"):
        make("ps_kd", memory="tabel")


def test_a_past_of_an_excluded_class_is_finite() -> None:
    logits = torch.tensor([[1.0, 0.5, -torch.inf]], dtype=torch.float64, requires_grad=True)
    loss = loss_of(constant(0.5), logits, numbers(0.6, 0.4, 0.0)[None], torch.tensor([0]), at(2))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table", "snapshot"])
def test_alpha_zero_trains_what_labels_alone_train(name: str, tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "teacher=none", "objective=ce"], tmp_path / "ce")
    run([*tiny, *PSKD_RUNS[name], "objective.alpha_T=0"], tmp_path / "ps_kd")
    assert_bit_equal(weights(tmp_path / "ps_kd"), weights(tmp_path / "ce"))


@pytest.mark.parametrize("name", ["table", "snapshot", "ema"])
def test_the_first_epoch_trains_what_labels_alone_train(name: str, tiny: list[str], tmp_path: Path) -> None:
    pace = ["optim.epochs=2", "optim.schedule.name=constant"]
    for folder, objective in (("ce", ["teacher=none", "objective=ce"]), ("ps_kd", PSKD_RUNS[name])):
        run([*tiny, *objective, *pace], tmp_path / folder)
    ours, theirs = (training_lines(tmp_path / folder) for folder in ("ps_kd", "ce"))
    same = [mine["grad_norm"] == other["grad_norm"] for mine, other in zip(ours, theirs, strict=True)]
    assert same[:3] == [True] * 3  # three steps are an epoch
    assert same[3] is False


@pytest.mark.parametrize(("name", "step"), [*((name, 4) for name in PSKD_RUNS), ("table", 2), ("snapshot", 7)])
def test_a_run_killed_in_the_middle_is_resumed_to_the_same_bytes(
    name: str, step: int, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, *PSKD_RUNS[name], "source.batch_size=40", "optim.epochs=3", "run.checkpoint_every=0.6"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["table", "snapshot"])
def test_accumulation_does_not_change_gradients(name: str, tiny: list[str], tmp_path: Path) -> None:
    base = [*tiny, *PSKD_RUNS[name], "optim.epochs=3"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[20,7,5]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
