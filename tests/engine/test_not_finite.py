"""A loss or gradient that is not finite stops the run before the update, says what and where, and loses nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdrun.engine import loop, state
from kdrun.engine.loop import NotFinite
from kdrun.engine.records import read_json, write_json
from tests.conftest import Outcome
from tests.engine.running import assert_bit_equal, assert_same_run, checkpoint_tensors, parameters, run, staged, training_lines

POISONED = ["objective._target_=tests.engine.parts.Poisoned", "run.allow=[tests]", "optim.epochs=4", "dataset.noise=0.1"]
STEP = 8  # from 1; three steps an epoch, so the last checkpoint is that of step 6
WHAT = {"not_a_number": "term poison", "infinite": "term poison", "gradient": "the gradient (every term is finite)"}


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    file = tmp_path / "trap"
    file.touch()
    return file


def poisoned(tiny: list[str], trap: Path, what: str) -> list[str]:
    return [*tiny, *POISONED, f"objective.trap={trap}", f"objective.at_step={STEP - 1}", f"objective.what={what}"]


@pytest.mark.parametrize("what", WHAT)
def test_what_is_not_finite_stops_the_run_before_the_update(
    what: str, tiny: list[str], trap: Path, tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base, folder = poisoned(tiny, trap, what), tmp_path / "run"
    failed = kdrun("train", *base, f"run.dir={folder}", "--quiet")
    assert failed.code == 1
    assert f"not finite at step {STEP} of student, phase student: {WHAT[what]}; batch of 32 samples, ids " in failed.err
    assert "Traceback" not in failed.err
    bundle = read_json(folder / "not_finite.json")
    assert (bundle["step"], bundle["stage"], bundle["phase"], len(bundle["ids"])) == (STEP, "student", "student", 32)
    assert all(str(i) in failed.err for i in bundle["ids"][:3])
    assert math.isfinite(bundle["terms"]["ce"])
    assert not math.isfinite(float(bundle["terms"]["poison"] if what != "gradient" else bundle["grad_norm"]))  # "nan" or "inf"
    assert len(training_lines(folder)) == STEP - 1
    # The last good checkpoint loads, and once the cause is gone the run goes on as if nothing had been.
    assert (state.newest(folder / "checkpoints") or [None])[0] == 6
    assert all(bool(t.isfinite().all()) for t in checkpoint_tensors(folder).values() if t.is_floating_point())
    assert kdrun("resume", str(folder), "--quiet").code == 1  # the cause is still there
    trap.unlink()
    assert kdrun("resume", str(folder), "--quiet").code == 0
    run(base, tmp_path / "unbroken")
    assert_same_run(folder, tmp_path / "unbroken")


@pytest.mark.parametrize("what", WHAT)
def test_the_weights_are_those_before_the_bad_step(what: str, tiny: list[str], trap: Path, tmp_path: Path) -> None:
    run = staged([*poisoned(tiny, trap, what), "optim.ema=0.9"], tmp_path / "run")
    for _ in range(STEP - 1):
        loop.train_step(run.stage, run)
    assert run.stage.ema is not None
    before, average = parameters(run.stage.learner), parameters(run.stage.ema)
    momentum = [s["momentum_buffer"].clone() for s in run.stage.optimizers["student"].state.values()]
    with pytest.raises(NotFinite):
        loop.train_step(run.stage, run)
    assert run.stage.step == STEP - 1
    assert_bit_equal(parameters(run.stage.learner), before)
    assert_bit_equal(parameters(run.stage.ema), average)
    assert all(map(torch.equal, momentum, [s["momentum_buffer"] for s in run.stage.optimizers["student"].state.values()]))


def test_a_term_without_weight_cannot_stop_a_run(tiny: list[str], trap: Path, tmp_path: Path) -> None:
    """It is part of neither the loss nor its gradient."""
    base = [*poisoned(tiny, trap, "infinite"), "objective.weight=0"]
    summary = run(base, tmp_path / "run")
    assert summary["steps"] == 12
    lines = training_lines(tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[STEP - 1]["terms"]["poison"] is None  # infinite, which JSON has no number for
    assert '"poison": null' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_json_has_no_number_for_is_null_in_every_record(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": (1, math.nan)})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse) == {
        "a": None,
        "b": [None, 1.5, {"c": None}],
        "d": [1, None],
    }


def test_a_bad_step_on_an_accelerator_is_found_at_the_next_logging_step_and_nothing_after_it_is_saved(
    tiny: list[str], trap: Path, tmp_path: Path
) -> None:
    """There the check is deferred (one host sync per logging step); simulated by the stage's word for its device."""

    class Elsewhere:
        type = "cuda"

    run = staged([*poisoned(tiny, trap, "not_a_number"), "run.log_every=5"], tmp_path / "run")
    for _ in range(STEP - 1):
        loop.train_step(run.stage, run)
    finite, bad = (torch.tensor(v) for v in (1.0, math.nan))
    batch = run.stage.source.group(0)
    run.stage.device = Elsewhere()  # type: ignore[assignment]
    loop.stop_if_not_finite(run.stage, "student", batch, bad, {"ce": bad}, finite)
    with pytest.raises(NotFinite, match=f"not finite since step {STEP}"):
        run.save(STEP)
    assert not run.checkpoints.exists() or state.newest(run.checkpoints) is None
    run.stage.step = 9
    with pytest.raises(NotFinite, match=f"not finite since step {STEP}"):
        loop.stop_if_not_finite(run.stage, "student", batch, finite, {"ce": finite}, finite)
    run.stage.first_bad_step = None
    with pytest.raises(NotFinite, match="step 10 of student, phase student: term ce"):  # the logging step itself: it can be named
        loop.stop_if_not_finite(run.stage, "student", batch, bad, {"ce": bad}, finite)
