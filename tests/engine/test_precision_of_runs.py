"""Autocast and compilation change speed; weights stay fp32 and the first loss is the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kdrun.engine import loop
from tests.engine.running import run, staged, training_lines, weights

OBJECTIVES = {
    "kd": ["objective=kd"],
    "pld": ["objective=pld"],
    "fitnet": ["objective=fitnet", "objective.student_tap=f1", "objective.teacher_tap=f1"],
    "crd": ["objective=crd", "objective.negatives=20", "objective.width=8"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_autocast_keeps_weights_in_fp32_and_losses_finite(name: str, tiny: list[str], live: list[str], tmp_path: Path) -> None:
    base = [*tiny, *live, *OBJECTIVES[name], "optim.lr=0.01"]
    run(base, tmp_path / "fp32")
    run([*base, "hardware.dtype=bf16"], tmp_path / "bf16")
    assert {t.dtype for t in weights(tmp_path / "bf16").values()} == {torch.float32}
    full, half = ([line["loss"] for line in training_lines(tmp_path / folder)] for folder in ("fp32", "bf16"))
    assert all(map(math.isfinite, half))
    assert half != full  # it really ran in another precision
    assert half[0] == pytest.approx(full[0], rel=0.02)


def test_losses_are_added_up_in_fp32_under_autocast(tiny: list[str], tmp_path: Path) -> None:
    stage = staged([*tiny, "objective=kd", "hardware.dtype=bf16"], tmp_path / "run").stage
    batch = stage.source.group(0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = stage.forward(batch, stage.teacher.signal(batch, stage.objective.needs()), "student")
    assert {term.sum.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_compiled_step_has_the_loss_and_gradient_of_the_eager_one(name: str, tiny: list[str], live: list[str], tmp_path: Path) -> None:
    base = [*tiny, *live, *OBJECTIVES[name], "run.max_steps=3", "source.drop_last=true"]
    run(base, tmp_path / "eager")
    run([*base, "hardware.compile=on"], tmp_path / "compiled")
    eager, compiled = (training_lines(tmp_path / folder) for folder in ("eager", "compiled"))
    assert len(compiled) == 3
    for key in ("loss", "grad_norm"):
        assert compiled[0][key] == pytest.approx(eager[0][key], rel=1e-5)


@pytest.mark.slow
def test_compiled_runs_in_one_process_do_not_share_taps(tiny: list[str], live: list[str], tmp_path: Path) -> None:
    """The arms of a comparison do follow each other in one process, with networks of one class and taps of their own."""
    base = [*tiny, *live, "run.max_steps=2", "source.drop_last=true"]
    for number, tap in enumerate(["f1", "f2", "p1"]):
        arm = [*base, *OBJECTIVES["fitnet"], f"objective.teacher_tap={tap}"]
        run(arm, tmp_path / f"eager{number}")
        run([*arm, "hardware.compile=on"], tmp_path / f"compiled{number}")
        eager, compiled = (training_lines(tmp_path / f"{name}{number}")[0] for name in ("eager", "compiled"))
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_compiled_step_is_one_graph(tiny: list[str], live: list[str], tmp_path: Path) -> None:
    """Taps are values, not side effects, so nothing breaks the graph."""
    stage = staged([*tiny, *live, *OBJECTIVES["fitnet"]], tmp_path / "run").stage
    forward = torch.compile(stage.learner, fullgraph=True, backend="aot_eager")
    batch = stage.source.group(0)[0]
    terms, _ = forward(batch, stage.teacher.signal(batch, stage.objective.needs()), "student")
    loop.add_up(terms, stage.objective.weights(stage.progress), loop.count_items(stage, [batch])).backward()
