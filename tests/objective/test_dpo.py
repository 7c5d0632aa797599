"""DPO, and what holds for every objective on pairs: pairs of completions end to end, and what is refused. SimPO's own: test_simpo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.dataset.text import TextData
from kdrun.dataset.tokens import POSITIONS, REJECTED, beside
from kdrun.student.language import causal_lm
from kdrun.student.taps import Tapped
from kdrun.types import Batch, Context, ModelSpec, Progress, Signal, Start
from tests.conftest import Outcome
from tests.dataset.texts import LLAMA
from tests.dataset.words import WORDS, pairs, write_jsonl, write_model, write_tokenizer
from tests.engine.running import assert_same_run, assert_same_training, resume, run, run_killed, training_lines
from tests.objective.spoken import Said
from tests.objective.toy import make

pytest.importorskip("transformers")
NAMES = ("dpo", "simpo")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


def preferences(count: int = 24) -> list[dict[str, str]]:
    """The right answer against a longer or shorter one."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(WORDS[(3 * i + j) % 9] for j in range(1 + (i + 1) % 4))}
        for i, row in enumerate(pairs(count))
    ]


def load(tmp_path: Path) -> Data:
    file = write_jsonl(tmp_path / "pairs.jsonl", preferences())
    return TextData(path=str(file), tokenizer=str(write_tokenizer(tmp_path / "tokenizer")), max_length=64).load()


def model(size: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return causal_lm(size, config={**LLAMA, "vocab_size": size}).double()


def ready(name: str, student: nn.Module, teacher: nn.Module, classes: int, **values: Any) -> Any:
    objective = make(name, **values)
    spec = ModelSpec(classes, (8,), {}, (8, classes))
    objective.setup(Context(spec, spec, classes, torch.zeros(4, dtype=torch.int64), 0, steps_per_epoch=3, total_steps=30))
    objective.start(Start(student, teacher, lambda: iter(())), nn.ModuleDict())
    return objective


def step(objective: Any, student: nn.Module, batches: list[Batch]) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """(loss, gradient, the rows of after_step) of one optimiser step, as the loop takes it."""
    count = sum(objective.count(batch)["sample"] for batch in batches)
    loss, kept = torch.zeros((), dtype=torch.float64), []
    for batch in batches:
        terms, rows = objective.compute(Tapped(student, {}), batch, Signal(None, {}), "student", nn.ModuleDict(), None)
        loss, kept = loss + objective.weights(Progress(0, 30, 3))["preference"] * terms["preference"].sum / count, [*kept, rows]
    found = torch.autograd.grad(loss, list(student.parameters()))
    return loss.detach(), list(found), {name: torch.cat([rows[name] for rows in kept]) for name in kept[0]}


# -- numbers --------------------------------------------------------------------------------------------------------------


class Sure(nn.Module):
    """Says token 0 with these log-probabilities [B, T], by turns those of the chosen and of the rejected."""

    def __init__(self, *log_probs: Tensor) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(part) for part in log_probs])
        self.vocabulary, self.asked = 2, 0

    def forward(self, x: Tensor) -> Tensor:
        said = self.parts[self.asked % 2]
        self.asked += 1
        return torch.stack([said, torch.log(-torch.expm1(said))], -1)


def spread(total: float, count: int) -> Tensor:
    return torch.full((1, count), total / count, dtype=torch.float64)


def pair_of(chosen: int, rejected: int) -> Batch:
    """One pair of completions of so many tokens, all of them id 0."""
    row, other = (torch.zeros(1, n, dtype=torch.int64) for n in (chosen, rejected))
    ids = torch.zeros(1, dtype=torch.int64)
    extra = {f"{REJECTED}_{key}": value for key, value in {"inputs": other, "targets": other, POSITIONS: other}.items()}
    return Batch(row, row, ids, ids, {POSITIONS: row, **extra})


def test_dpo_of_the_example() -> None:
    """(l_w, l_l, r_w, r_l) = (-10, -12, -11, -11.5), beta 0.1: margin 0.15."""
    student, reference = Sure(spread(-10, 5), spread(-12, 8)), Sure(spread(-11, 5), spread(-11.5, 8))
    loss, _, kept = step(ready("dpo", student, reference, 2), student, [pair_of(5, 8)])
    assert loss.item() == pytest.approx(0.620957, abs=5.1e-7)
    assert kept["margin"].item() == pytest.approx(0.15, abs=1e-9)
    assert kept["correct"].item() == 1


def test_a_student_that_is_its_reference_has_the_loss_of_a_coin(tmp_path: Path) -> None:
    data = load(tmp_path)
    student = model(data.classes, 0)
    loss, gradient, kept = step(ready("dpo", student, model(data.classes, 0), data.classes), student, [next(data.batches("train", 6))])
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert kept["margin"].abs().max() < 1e-5
    assert max(g.abs().max() for g in gradient) > 1e-3


# -- laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["whole", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_accumulation_does_not_change_gradients(name: str, projection: str, tmp_path: Path) -> None:
    data = load(tmp_path)
    student, teacher = model(data.classes, 0), model(data.classes, 1)
    objective = ready(name, student, teacher, data.classes, projection=projection)
    rows = lambda *index: data.rows("train", torch.tensor(index), torch.zeros(len(index), dtype=torch.int64), 0)  # noqa: E731
    whole = step(objective, student, [rows(0, 1, 2, 3, 4)])
    for cut in ([rows(0), rows(1), rows(2), rows(3), rows(4)], [rows(0, 1, 2), rows(3, 4)]):
        loss, gradient, kept = step(objective, student, cut)
        torch.testing.assert_close(loss, whole[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(kept, whole[2], rtol=1e-6, atol=1e-8)
        for mine, other in zip(gradient, whole[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_give_what_the_whole_gives(name: str, tmp_path: Path) -> None:
    data = load(tmp_path)
    student, teacher, batch = model(data.classes, 0), model(data.classes, 1), next(data.batches("train", 6))
    first, second = (step(ready(name, student, teacher, data.classes, projection=kind), student, [batch]) for kind in ("whole", "chunked"))
    torch.testing.assert_close(second[0], first[0], rtol=1e-6, atol=1e-8)
    for mine, other in zip(second[1], first[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    assert max(g.abs().max() for g in first[1]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (Said(scale * torch.randn(1, 5, 3, generator=g).sign()) for _ in range(2))
    loss, gradient, _ = step(ready(name, student, teacher, 3), student, [pair_of(5, 5)])
    assert loss.isfinite()
    assert all(part.isfinite().all() for part in gradient)


def words_of(tmp_path: Path, name: str, *more: str) -> list[str]:
    file, student = write_jsonl(tmp_path / "pairs.jsonl", preferences()), write_model(tmp_path / "student")
    teacher = [f"teacher.name={student}"] if name == "dpo" else ["teacher=none"]
    return [
        "recipe=lm_kd", f"objective={name}", "evaluation=preference", f"student.name={student}", *teacher, f"dataset.path={file}",
        "source.batch_size=5", "hardware=cpu", "hardware.threads=1", "run.log_every=1", "dataset.max_length=64", "optim.epochs=2",
        "optim.lr=0.02", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_run_split_or_killed_is_the_same_run_and_learns_what_is_preferred(name: str, tmp_path: Path) -> None:
    words = words_of(tmp_path, name, "run.checkpoint_every=3")
    summary = run(words, tmp_path / "whole")
    lines = training_lines(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"preferred", "preferred_by_length", "margin", "nll"} <= summary["test"].keys()
    run([*words, "hardware.micro_batch=[1,4]"], tmp_path / "split")
    assert_same_training(tmp_path / "split", tmp_path / "whole", rtol=2e-4)
    run_killed(words, tmp_path / "broken", "step_done", 7)
    resume(words, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_the_teacher_margin_makes_the_reward_margin(tmp_path: Path) -> None:
    """A student that does not move has its reference's margin on the held-out pairs."""
    summary = run(words_of(tmp_path, "dpo", "optim.lr=1e-12"), tmp_path / "still")
    assert summary["test"]["margin"] == pytest.approx(summary["teacher"]["margin"], rel=1e-5)


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["source=rollout"], "source", "source=loader"),
        (["dataset.columns={completion: chosen}", "evaluation=language"], "dataset", "chosen and rejected"),
        (["teacher=none", "~teacher.name"], "teacher", "needs a teacher"),
        (["teacher=ema", "~teacher.name"], "teacher", "a live teacher"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_spent(
    words: list[str], key: str, remedy: str, kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    dropped = tuple(word[1:] for word in words if word.startswith("~")) or ("nothing",)
    base = [word for word in words_of(tmp_path, "dpo") if not word.startswith(dropped)]
    refused = kdrun("train", *base, *(word for word in words if not word.startswith("~")), f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert f"\n{key}: " in refused.err
    assert remedy in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "values"), [("dpo", {"beta": 0.0}), ("dpo", {"projection": "part"})])
def test_values_out_of_range_are_refused_by_name(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        make(name, **values)


def test_both_completions_follow_the_same_prompt(tmp_path: Path) -> None:
    data = load(tmp_path)
    batch = next(data.batches("train", 5))
    other = beside(batch, REJECTED)
    assert data.vocabulary is not None
    for i, row in enumerate(json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()[:5]):
        for part, answer in ((batch, row["chosen"]), (other, row["rejected"])):
            assert data.vocabulary.decode(part.targets[i][part.targets[i] >= 0].tolist()) == f"{answer} </s>"
            assert data.vocabulary.decode(part.inputs[i].tolist()).startswith(f"<s> {row['prompt']} {answer}")
