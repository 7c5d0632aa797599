"""run.diagnose: the gradient of each term at the logits, beside a run that does not notice it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.engine import loop
from kdrun.engine.diagnosis import first_step, look, warnings_of
from kdrun.engine.records import DIAGNOSTICS, read_json, read_lines
from tests.conftest import TINY
from tests.engine.running import Notes, assert_same_run, parameters, resume, run, run_killed, staged

KD = [*TINY, "objective=kd", "run.log_every=2", "optim.epochs=4"]
ASKED = "run.diagnose=true"
DROPOUT = ["student=custom", "student._target_=tests.engine.parts.DropoutMLP", "student.in_features=32", "run.allow=[tests]"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / DIAGNOSTICS)


@pytest.mark.parametrize("more", [[], ["hardware.micro_batch=[20,12]"]], ids=["whole", "cut"])
def test_a_run_is_bit_equal_with_and_without_it(more: list[str], tmp_path: Path) -> None:
    run([*KD, *more], tmp_path / "without")
    run([*KD, *more, ASKED], tmp_path / "with")
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / DIAGNOSTICS).exists()
    assert [line["step"] for line in lines(tmp_path / "with")] == [1, 2, 4, 6, 8, 10, 12]


def test_dropout_and_buffers_do_not_notice_it(tmp_path: Path) -> None:
    without = [option for option in KD if not option.startswith("student")]
    run([*without, *DROPOUT], tmp_path / "without")
    run([*without, *DROPOUT, ASKED], tmp_path / "with")
    assert_same_run(tmp_path / "with", tmp_path / "without")


def test_batch_norm_does_not_notice_it(tmp_path: Path) -> None:
    images = ["dataset=digits", "dataset.subset=64", "dataset.subset_test=32", "student=resnet8", "teacher=none", "objective=ce"]
    images += ["optim.epochs=1", "source.batch_size=32", "hardware=cpu", "hardware.threads=1", "hardware.compile=off", "run.log_every=1"]
    run(images, tmp_path / "without")
    run([*images, ASKED], tmp_path / "with")
    assert_same_run(tmp_path / "with", tmp_path / "without")


def test_shares_sum_to_one_and_equal_gradients_computed_by_hand(tmp_path: Path) -> None:
    stage = staged([*KD, "objective.kd_weight=0.7", "objective.ce_weight=0.3", "objective.temperature=3"], tmp_path / "run").stage
    group = stage.source.group(0)
    signals = [stage.teacher.signal(batch, stage.objective.needs()) for batch in group]
    counts = loop.count_items(stage, group)
    told = look(stage, "student", group, signals, stage.objective.weights(stage.progress), counts)
    assert isinstance(told, dict)

    (batch,), (signal,) = group, signals
    logits = stage.learner.student(batch.inputs)[0].detach().requires_grad_()
    soft = 9 * torch.nn.functional.kl_div((logits / 3).log_softmax(1), (signal.logits / 3).softmax(1), reduction="batchmean")
    losses = {"ce": 0.3 * torch.nn.functional.cross_entropy(logits, batch.targets), "kd": 0.7 * soft}
    by_hand = {name: torch.autograd.grad(loss, logits, retain_graph=True)[0].double() for name, loss in losses.items()}
    norms = {name: float(g.norm()) for name, g in by_hand.items()}
    for name, term in told["terms"].items():
        assert term["norm"] == pytest.approx(norms[name], rel=1e-5)
        assert term["share"] == pytest.approx(norms[name] / sum(norms.values()), rel=1e-5)
        assert term["weight"] * term["value"] == pytest.approx(float(losses[name].detach()), rel=1e-5)
    assert sum(term["share"] for term in told["terms"].values()) == pytest.approx(1)
    dot = float((by_hand["ce"] * by_hand["kd"]).sum())
    assert told["cosines"]["ce|kd"] == pytest.approx(dot / norms["ce"] / norms["kd"], rel=1e-5)
    assert signal.logits is not None
    assert told["agreement"] == pytest.approx(100 * float((logits.argmax(1) == signal.logits.argmax(1)).float().mean()))


def test_it_does_not_depend_on_how_the_batch_is_cut_and_leaves_no_trace(tmp_path: Path) -> None:
    found = []
    for name, more in (("whole", []), ("cut", ["hardware.micro_batch=[20,12]"])):
        stage = staged([*KD, *more], tmp_path / name).stage
        before, state = parameters(stage.learner), torch.get_rng_state()
        group = stage.source.group(0)
        signals = [stage.teacher.signal(batch, stage.objective.needs()) for batch in group]
        found.append(look(stage, "student", group, signals, stage.objective.weights(stage.progress), loop.count_items(stage, group)))
        assert all(torch.equal(value, before[key]) for key, value in parameters(stage.learner).items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in stage.learner.parameters())
    whole, cut = found
    for key in ("norm", "share", "value"):
        assert [t[key] for t in whole["terms"].values()] == pytest.approx([t[key] for t in cut["terms"].values()], rel=1e-5)
    assert whole["cosines"]["ce|kd"] == pytest.approx(cut["cosines"]["ce|kd"], rel=1e-4)


def test_a_term_on_features_has_no_share(tmp_path: Path, live: list[str]) -> None:
    own = ["objective=fitnet", "objective.teacher_tap=f1", "objective.student_tap=f1", "teacher.taps={f1: relu1}"]
    run([*TINY, *live, *own, ASKED], tmp_path / "run")
    terms = lines(tmp_path / "run")[0]["terms"]
    reaching = [name for name, term in terms.items() if "share" in term]
    assert reaching == ["ce"]
    assert terms["ce"]["share"] == 1.0
    assert len(terms) == 2


def test_a_killed_and_resumed_run_has_every_line_once(tmp_path: Path) -> None:
    run([*KD, ASKED], tmp_path / "unbroken")
    run_killed([*KD, ASKED], tmp_path / "broken", "step_done", 8)
    resume([*KD, ASKED], tmp_path / "broken")
    assert lines(tmp_path / "broken") == lines(tmp_path / "unbroken")


def test_several_phases_are_said_to_be_beyond_it(tmp_path: Path) -> None:
    notes = Notes()
    modes = ["dataset=gaussians", "dataset.n_train=64", "dataset.n_test=32", "teacher=truth", "student=mlp", "objective=tgeo_kd"]
    more = ["dataset.validation=0.25", "source.held_out=8", "source.batch_size=16", "optim.epochs=1", "hardware=cpu", "hardware.threads=1"]
    run([*modes, *more, ASKED], tmp_path / "run", notes)
    (line,) = lines(tmp_path / "run")
    assert "several phases" in line["reason"]
    assert any("several phases" in note for note in notes.notes)


def test_a_term_that_hardly_counts_is_told_once(tmp_path: Path) -> None:
    notes = Notes()
    run([*KD, "objective.kd_weight=1.0e-5", "objective.ce_weight=1.0", ASKED], tmp_path / "run", notes)
    assert all("ce has 100.0 % of the gradient" in line["warnings"][0] for line in lines(tmp_path / "run"))
    assert sum("of the gradient at the logits: the other terms hardly count" in note for note in notes.notes) == 1


def test_warnings_name_what_is_weak() -> None:
    assert warnings_of({"a": {"share": 1.0}}) == []
    assert warnings_of({"a": {"share": 0.4}, "b": {"share": 0.6}, "c": {}}) == []
    texts = [text for text, _ in warnings_of({"a": {"share": 0.005}, "b": {"share": 0.5}, "c": {"share": 0.495}})]
    assert texts == ["a has 0.5 % of the gradient at the logits: it hardly counts"]


def test_the_first_step_is_told_in_words(tmp_path: Path) -> None:
    told = first_step(
        "student", {"ce": 4.61, "kd": 15.3}, {"ce": 1.0, "kd": 0.9}, 100, {"terms": {"ce": {"share": 0.08}, "kd": {"share": 0.92}}}
    )
    assert told == (
        "student step 0: ce 4.61 (chance level ln 100 = 4.61), kd 15.3 x weight 0.9 = 13.8; kd has 92 % of the gradient at the logits"
    )
    notes = Notes()
    run(TINY, tmp_path / "run", notes)
    assert sum(note.startswith("student step 0: ") for note in notes.notes) == 1
    assert math.isfinite(read_json(tmp_path / "run" / "summary.json")["value"])
