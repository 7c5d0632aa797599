"""Supervised fine-tuning: its number, what it looks at, and the student that a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kdrun.dataset.tokens import POSITIONS
from kdrun.engine.records import STUDENT_FILE
from kdrun.types import Progress
from tests.dataset.texts import MODELS, UnevenTexts, V, alone, batch_of, samples, tiny, uneven_run
from tests.engine.running import run, weights
from tests.objective.spoken import Said, Step, ready, scored

LORA = "student.lora={r: 2, lora_alpha: 4, target_modules: all-linear}"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


def test_value_and_gradient_of_the_example() -> None:
    """q = softmax of [0, 1, .5, 0], y = 0: q - onehot(y)."""
    student = Said(torch.tensor([[[0, 1, 0.5, 0]]], dtype=torch.float64))
    step = Step(ready("sft", student, None, classes=4), student, None, [scored((1, 1))])
    assert step.loss.item() == pytest.approx(1.851129, abs=1e-6)
    assert step.gradient[0].flatten().tolist() == pytest.approx([-0.842940, 0.426933, 0.258948, 0.157060], abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_transformers_own_loss(name: str) -> None:
    """Labels -100 where a token is not to be learned, shifted by the model itself."""
    network, sequences = tiny(name), samples([9, 6, 4])
    found = Step(ready("sft", network, None), network, None, [batch_of(alone(sequences))])
    total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        ids, learned = torch.tensor([sequence.tokens]), torch.tensor([sequence.scored])
        # The padding of the matrix is in transformers' softmax, and not in ours.
        logits = network(ids).logits[..., :V]
        total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1), ids.masked_fill(~learned, -100)[:, 1:].flatten(), reduction="sum")
    count = sum(sum(s.scored) for s in sequences)
    assert found.loss.item() == pytest.approx(total.item() / count, rel=1e-6)


def test_what_is_not_scored_gets_no_gradient() -> None:
    student = Said(torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    targets = torch.tensor([[-1, 2, -1], [4, -1, -1]])
    step = Step(ready("sft", student, None, classes=5), student, None, [scored((2, 3), targets)])
    slope = step.gradient[0]
    assert (slope[targets < 0] == 0).all()
    expected = (student.logits.softmax(-1) - F.one_hot(targets.clamp(min=0), 5))[targets >= 0] / 2
    torch.testing.assert_close(slope[targets >= 0], expected.detach())


def test_a_step_without_a_scored_token_has_no_loss() -> None:
    network, batch = tiny(), batch_of(alone(samples([4, 6])))
    empty = batch._replace(targets=torch.full_like(batch.targets, -1))
    for projection in ("whole", "chunked"):
        step = Step(ready("sft", network, None, projection=projection), network, None, [empty])
        assert step.loss == 0
        assert all((g == 0).all() for g in step.gradient)


def test_it_does_not_listen() -> None:
    objective = ready("sft", tiny(), None)
    assert not objective.needs().teacher_logits
    assert objective.weights(Progress(0, 1, 1)) == {"ce": 1.0}


def sft_run(tmp_path: Path, student: str) -> list[str]:
    return [*(word for word in uneven_run(tmp_path / "t", student) if not word.startswith("teacher")), "teacher=none", "objective=sft"]


@pytest.mark.parametrize(("student", "more"), [("llama", []), ("gpt2", []), ("llama", [LORA])], ids=["llama", "gpt2", "lora"])
def test_the_saved_student_loads_in_plain_transformers_and_says_the_same(student: str, more: list[str], tmp_path: Path) -> None:
    summary = run([*sft_run(tmp_path, student), *more], tmp_path / "run")
    described = MODELS[student]
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described))
    state = load_file(tmp_path / "run" / STUDENT_FILE)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    plain.eval()
    total, count = 0.0, 0
    for batch in UnevenTexts(n_train=33, n_test=12).load().batches("test", 5):
        logits = plain(batch.inputs, position_ids=batch.extra[POSITIONS]).logits[..., :V]
        total += F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1, reduction="sum").item()
        count += int((batch.targets >= 0).sum())
    assert summary["value"] == pytest.approx(total / count, rel=1e-4)


def test_a_run_with_adapters_changes_the_layers_that_have_them_alone(tmp_path: Path) -> None:
    base = [*sft_run(tmp_path, "llama"), LORA]
    for folder, rate in (("trained", 0.5), ("still", 1e-20)):
        run([*base, f"optim.lr={rate}"], tmp_path / folder)
    trained, still = weights(tmp_path / "trained"), weights(tmp_path / "still")
    moved = {name for name in still if not torch.allclose(trained[name], still[name], atol=1e-7)}
    assert moved
    assert all(".self_attn." in name or ".mlp." in name for name in moved)
