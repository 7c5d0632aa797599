"""Universal Logit Distillation: its numbers through the objective, two tokenizers end to end, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.tokens import STRETCHES
from kdrun.losses.uld import hybrid_uld, uld
from kdrun.student.language import causal_lm
from kdrun.student.taps import Tapped
from kdrun.teacher.context import INPUTS, TARGETS
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Context, ModelSpec, Needs, Progress, Start
from tests.dataset.texts import LLAMA
from tests.dataset.tongues import load, words_of, write_two
from tests.engine.running import assert_same_run, assert_same_training, parameters, resume, run, run_killed, staged, training_lines
from tests.objective.spoken import Said, scored
from tests.objective.toy import make

pytest.importorskip("transformers")
Q, P = [0.0, 1.0, 0.5, 0.0], [0.6, 0.3, 0.1]
SETTINGS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "bytes": {"align": "bytes"},
    "hybrid": {"hybrid": True},
    "bytes+hybrid": {"align": "bytes", "hybrid": True},
    "token_mean": {"uld_reduction": "token_mean", "reduction": "seq_mean"},
    "warm": {"temperature": 2.0, "ce_weight": 0.0},
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return write_two(tmp_path)


def model(size: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return causal_lm(size, config={**LLAMA, "vocab_size": size, "max_position_embeddings": 128}).double()


def ready(data: Any, student: nn.Module, teacher: nn.Module, **values: Any) -> Any:
    """The objective as a run sets it up on this data."""
    objective = make("uld", **values)
    spec = ModelSpec(data.classes, (8,), {}, (8, data.classes))
    objective.setup(Context(spec, spec, data.classes, torch.zeros(4, dtype=torch.int64), 0, steps_per_epoch=3, total_steps=30))
    rows = ((batch, None) for batch in data.batches("train", 4))
    objective.start(Start(student, teacher, lambda: rows), nn.ModuleDict())  # type: ignore[arg-type,return-value]
    return objective


def step(objective: Any, student: nn.Module, teacher: nn.Module, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradient of the student) of one optimiser step, as the loop takes it."""
    speaker = LiveTeacher(Tapped(teacher, {}), ModelSpec(1, (8,), {}, ()))
    counted = [objective.count(batch) for batch in batches]
    counts = {unit: max(1, sum(int(c[unit]) for c in counted)) for unit in objective.units()}
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        signal = speaker.signal(batch, objective.needs())
        terms, _ = objective.compute(Tapped(student, {}), batch, signal, "student", nn.ModuleDict(), None)
        weights = objective.weights(Progress(0, 30, 3))
        loss = loss + sum(weights[name] * term.sum / counts[term.unit] for name, term in terms.items())
    return loss.detach(), list(torch.autograd.grad(loss, list(student.parameters())))


# -- numbers --------------------------------------------------------------------------------------------------------------


def one_position(**values: Any) -> tuple[Tensor, list[Tensor]]:
    student, teacher = Said(torch.tensor([[Q]], dtype=torch.float64)), Said(torch.tensor([[P]], dtype=torch.float64).log())
    objective = make("uld", **values)
    spec = ModelSpec(4, (8,), {}, (8, 4))
    objective.setup(Context(spec, spec, 4, torch.zeros(4, dtype=torch.int64), 0, steps_per_epoch=3, total_steps=30))
    return step(objective, student, teacher, [scored((1, 1))])


def test_value_and_gradient_of_the_example() -> None:
    loss, (gradient,) = one_position(ce_weight=0.0)
    assert loss.item() == pytest.approx(0.428239, abs=5.1e-7)
    assert gradient.flatten().tolist() == pytest.approx([0.215448, -0.268216, -0.162681, 0.215448], abs=1e-6)


def test_weights_add_up_the_two_terms() -> None:
    """CE of y = 0 is 1.851129."""
    assert one_position(uld_weight=1.5)[0].item() == pytest.approx(1.851129 + 1.5 * 0.428239, abs=2e-6)


def laid(**rows: list[list[int]]) -> Batch:
    """A batch whose rows of targets are these; -1 where nothing is scored."""
    targets, theirs = torch.tensor(rows["own"]), torch.tensor(rows["theirs"])
    ids = torch.arange(len(targets))
    extra = {INPUTS: torch.zeros_like(theirs), TARGETS: theirs}
    return Batch(torch.zeros_like(targets), targets, ids, ids, extra)


@pytest.mark.parametrize("reduction", ["seq_mean", "token_mean", "seq_sum"])
def test_tokens_are_paired_in_order_turn_by_turn_up_to_the_fewer(reduction: str) -> None:
    """Row 0: two turns, of 2 and 1 tokens against 1 and 3; row 1: one of 3 against 2 that come later."""
    batch = laid(own=[[-1, 1, 1, -1, 1], [1, 1, 1, -1, -1]], theirs=[[2, -1, -1, 2, 2, 2], [-1, -1, -1, -1, 2, 2]])
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, t, v, generator=g, dtype=torch.float64) for t, v in ((5, 4), (6, 7)))
    objective = make("uld", ce_weight=0.0, uld_reduction=reduction)
    spec = ModelSpec(4, (8,), {}, (8, 4))
    objective.setup(Context(spec, spec, 4, torch.zeros(4, dtype=torch.int64), 0, steps_per_epoch=3, total_steps=30))
    pair = lambda row, i, j: uld(student[row, i], teacher[row, j]).item()  # noqa: E731
    first, second = [pair(0, 1, 0), pair(0, 4, 3)], [pair(1, 0, 4), pair(1, 1, 5)]
    expected = {
        "seq_mean": (sum(first) / 2 + sum(second) / 2) / 2,
        "token_mean": sum(first + second) / 4,
        "seq_sum": sum(first + second) / 2,
    }
    assert step(objective, Said(student), Said(teacher), [batch])[0].item() == pytest.approx(expected[reduction], rel=1e-6)


def test_a_stretch_has_the_distribution_of_its_first_position_times_what_then_came() -> None:
    """Student: stretches of 2 and 1 tokens; teacher: of 1 and 2."""
    batch = laid(own=[[1, 2, 3]], theirs=[[4, 0, 5]])
    batch.extra.update({STRETCHES: torch.tensor([[0, 0, 1]]), f"teacher_{STRETCHES}": torch.tensor([[0, 1, 1]])})
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(1, 3, v, generator=g, dtype=torch.float64) for v in (4, 7))
    q, p = student[0].softmax(-1), teacher[0].softmax(-1)
    ranked = lambda a, b: (nn.functional.pad(a.sort(descending=True).values, (0, 3)) - b.sort(descending=True).values).abs().sum()  # noqa: E731
    expected = (ranked(q[0] * q[1, 2], p[0]) + ranked(q[2], p[1] * p[2, 5])) / 2
    objective = make("uld", ce_weight=0.0, align="bytes")
    spec = ModelSpec(4, (8,), {}, (8, 4))
    objective.setup(Context(spec, spec, 4, torch.zeros(4, dtype=torch.int64), 0, steps_per_epoch=3, total_steps=30))
    loss, (gradient,) = step(objective, Said(student), Said(teacher), [batch])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient[0, 1].abs().max() > 0  # the later token of a stretch learns too


def test_the_same_model_in_the_same_tokens_is_at_distance_zero_by_hybrid() -> None:
    z = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 0], [2, 2], [5, 5]])
    assert hybrid_uld(z, z, ids).abs().max() < 1e-12
    assert uld(z, z.flip(-1)).abs().max() < 1e-12  # blind to ids
    assert hybrid_uld(z, z.flip(-1), ids).min() > 1e-3  # and not where ids have a name


def test_hybrid_without_matches_is_uld_and_with_all_the_divergence() -> None:
    from kdrun.losses.token import generalised_jsd

    g = torch.Generator().manual_seed(0)
    q, p = (torch.randn(4, v, generator=g, dtype=torch.float64) for v in (6, 6))
    torch.testing.assert_close(hybrid_uld(q, p, torch.zeros(0, 2, dtype=torch.int64)), uld(q, p))
    every = torch.stack([torch.arange(6), torch.arange(6)], 1)
    torch.testing.assert_close(hybrid_uld(q, p, every, beta=0.3), generalised_jsd(q, p, 0.3))


# -- laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_accumulation_does_not_change_gradients(name: str, folders: dict[str, Path]) -> None:
    data = load(folders)
    student, teacher = model(data.classes, 0), model(data.translated.classes, 1)
    objective = ready(data, student, teacher, **SETTINGS[name])
    rows = lambda *index: data.rows("train", torch.tensor(index), torch.zeros(len(index), dtype=torch.int64), 0)  # noqa: E731
    whole = step(objective, student, teacher, [rows(0, 1, 2, 3, 4)])
    for cut in ([rows(0), rows(1), rows(2), rows(3), rows(4)], [rows(0, 1, 2), rows(3, 4)]):
        loss, gradient = step(objective, student, teacher, cut)
        torch.testing.assert_close(loss, whole[0], rtol=1e-8, atol=1e-10)
        for mine, other in zip(gradient, whole[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)
    assert max(g.abs().max() for g in whole[1]) > 1e-4


@pytest.mark.parametrize("name", ["tokens", "hybrid", "warm"])
def test_chunks_give_what_the_whole_gives(name: str, folders: dict[str, Path]) -> None:
    data = load(folders)
    student, teacher = model(data.classes, 0), model(data.translated.classes, 1)
    batch = next(data.batches("train", 6))
    parts = [ready(data, student, teacher, projection=kind, **SETTINGS[name]) for kind in ("whole", "chunked")]
    assert parts[0].needs() == Needs(teacher_logits=True)
    assert parts[1].needs() == Needs()
    (loss, gradient), (other_loss, other_gradient) = (step(objective, student, teacher, [batch]) for objective in parts)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-8)
    for mine, other in zip(other_gradient, gradient, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, scale: float, temperature: float, folders: dict[str, Path]) -> None:
    data = load(folders)
    batch = next(data.batches("train", 3))
    g = torch.Generator().manual_seed(0)
    student = Said(scale * torch.randn(*batch.inputs.shape, data.classes, generator=g).sign())
    teacher = Said(scale * torch.randn(*batch.extra[INPUTS].shape, data.translated.classes, generator=g).sign())
    silent = nn.Module()
    silent.vocabulary = data.classes  # type: ignore[assignment]
    forward = lambda network: lambda x, **_: network.logits  # noqa: E731
    for network in (student, teacher):
        network.forward = forward(network)  # type: ignore[method-assign]
    objective = ready(data, student, teacher, projection="whole", **{**SETTINGS[name], "temperature": temperature})
    loss, gradient = step(objective, student, teacher, [batch])
    assert loss.isfinite()
    assert all(part.isfinite().all() for part in gradient)


@pytest.mark.parametrize("more", [[], ["objective.align=bytes", "objective.hybrid=true"]], ids=["tokens", "bytes+hybrid"])
def test_a_run_split_or_killed_is_the_same_run(more: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    words = words_of(folders, *more, "run.checkpoint_every=3")
    summary = run(words, tmp_path / "whole")
    assert summary["teacher"]["nll"] > 0  # of its own tokens
    assert "kl_teacher" not in summary["test"]
    lines = training_lines(tmp_path / "whole")
    assert lines[-1]["terms"]["uld"] < lines[0]["terms"]["uld"] or lines[-1]["terms"]["ce"] < lines[0]["terms"]["ce"]
    run([*words, "hardware.micro_batch=[1,4]"], tmp_path / "split")
    assert_same_training(tmp_path / "split", tmp_path / "whole", rtol=2e-4)
    run_killed(words, tmp_path / "broken", "step_done", 7)
    resume(words, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_the_teacher_is_what_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    stage = staged(words_of(folders, "run.max_steps=3"), tmp_path / "run")
    before = parameters(stage.built.teacher.network)  # type: ignore[attr-defined]
    stage.begin(False)
    stage.advance()
    after = parameters(stage.built.teacher.network)  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "values",
    [
        {"ce_weight": -1.0}, {"uld_weight": -1.0}, {"temperature": 0.0}, {"beta": 1.0}, {"align": "words"}, {"uld_reduction": "dr"},
        {"ce_weight": 0.0, "uld_weight": 0.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        make("uld", **values)
